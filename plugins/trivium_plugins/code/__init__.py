"""Python: the standard library to read, its functions and small exercises to write, HumanEval to be measured on."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="code",
    conf="pkg://trivium_plugins.code.conf",
    sources={
        "code": Entry(
            "trivium_plugins.code.source:Code",
            "trivium_plugins.code.config:CodeConfig",
            help="the running Python's standard library, exercises with tests, and HumanEval",
        )
    },
    help="Python: the standard library, exercises with tests, and HumanEval",
)
