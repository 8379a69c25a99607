"""Licences: 2,400 texts to read, and questions about their category and their clauses with one right answer each."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="legal",
    conf="pkg://trivium_plugins.legal.conf",
    sources={
        "legal": Entry(
            "trivium_plugins.legal.source:Legal",
            "trivium_plugins.legal.config:LegalConfig",
            help="licence texts, their category, and what their clauses are about",
        )
    },
    help="licence texts, and verifiable questions about their category and clauses",
)
