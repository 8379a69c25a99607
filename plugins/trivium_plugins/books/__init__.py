"""Sherlock Holmes, a History of the United States, War and Peace, Jane Austen; fetched when first used."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="books",
    conf="pkg://trivium_plugins.books.conf",
    sources={
        "books": Entry(
            "trivium_plugins.books.source:Books",
            "trivium_plugins.books.config:BooksConfig",
            help="Sherlock Holmes, a History of the United States, War and Peace, Jane Austen",
        )
    },
    help="Sherlock Holmes, a History of the United States, War and Peace, Jane Austen",
)
