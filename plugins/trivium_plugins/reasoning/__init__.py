"""Problems of reasoning-gym with verifiable answers: sums, sequences, spelling and a hundred more, made as needed."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="reasoning",
    conf="pkg://trivium_plugins.reasoning.conf",
    sources={
        "reasoning": Entry(
            "trivium_plugins.reasoning.source:Reasoning",
            "trivium_plugins.reasoning.config:ReasoningConfig",
            help="procedural problems of reasoning-gym, judged by its own scorers (extra: reasoning)",
        )
    },
    help="procedural problems with verifiable answers, from reasoning-gym",
)
