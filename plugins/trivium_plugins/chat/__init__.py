"""7,168 human conversations (Chit Chat Challenge); fetched when first used."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="chat",
    conf="pkg://trivium_plugins.chat.conf",
    sources={
        "chat": Entry(
            "trivium_plugins.chat.source:Chat",
            "trivium_plugins.chat.config:ChatConfig",
            help="7,168 human conversations (Chit Chat Challenge)",
        )
    },
    help="7,168 human conversations (Chit Chat Challenge)",
)
