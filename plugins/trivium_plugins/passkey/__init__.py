"""A number hidden in filler text, to be found again: how far a model's context really reaches."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="passkey",
    conf="pkg://trivium_plugins.passkey.conf",
    sources={
        "passkey": Entry(
            "trivium_plugins.passkey.source:Passkey",
            "trivium_plugins.passkey.config:PasskeyConfig",
            help="five digits hidden in filler at several lengths and depths",
        )
    },
    help="a number hidden in filler text: how far a context reaches",
)
