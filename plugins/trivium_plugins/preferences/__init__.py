"""The true gloss of a word against another one (WordNet 3.0); fetched when first used."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="preferences",
    conf="pkg://trivium_plugins.preferences.conf",
    sources={
        "preferences": Entry(
            "trivium_plugins.preferences.source:Preferences",
            "trivium_plugins.preferences.config:PreferencesConfig",
            help="the true gloss of a word against another one (WordNet 3.0)",
        )
    },
    help="the true gloss of a word against another one (WordNet 3.0)",
)
