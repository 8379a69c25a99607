"""A bundled domain that teaches a small model to read, define, reckon, spell and remember: no download needed."""

from trivium.plugin import Plugin
from trivium.registry import Entry

plugin = Plugin(
    name="primer",
    conf="pkg://trivium_plugins.primer.conf",
    sources={
        "primer": Entry(
            "trivium_plugins.primer.source:Primer",
            "trivium_plugins.primer.config:PrimerConfig",
            help="bundled books, word definitions, verifiable tasks and short chats",
        )
    },
    help="books, definitions, verifiable tasks and short chats that come with the framework",
)
