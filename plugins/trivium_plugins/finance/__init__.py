"""Economies of the world: what the Factbook says of each, and questions whose answer is one figure with its unit."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="finance",
    conf="pkg://trivium_plugins.finance.conf",
    sources={
        "finance": Entry(
            "trivium_plugins.finance.source:Finance",
            "trivium_plugins.finance.config:FinanceConfig",
            help="the economies of the Factbook, and verifiable questions about their figures",
        )
    },
    help="the economies of the Factbook, and verifiable questions about their figures",
)
