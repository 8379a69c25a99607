"""Economies of the world in text and figures (World Factbook); fetched when first used."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="finance",
    conf="pkg://trivium_plugins.finance.conf",
    sources={
        "finance": Entry(
            "trivium_plugins.finance.source:Finance",
            "trivium_plugins.finance.config:FinanceConfig",
            help="economies of the world in text and figures (World Factbook)",
        )
    },
    help="economies of the world in text and figures (World Factbook)",
)
