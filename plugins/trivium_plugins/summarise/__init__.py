"""Short for long, learned from what packages ship: sections and their titles, functions and what they do."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="summarise",
    conf="pkg://trivium_plugins.summarise.conf",
    sources={
        "summarise": Entry(
            "trivium_plugins.summarise.source:Summarise",
            "trivium_plugins.summarise.config:SummariseConfig",
            help="titles of sections and first sentences of docstrings (extra: text)",
        )
    },
    help="titles of sections and first sentences of docstrings",
)
