"""Translation from English, learned from manual pages that Debian ships in several languages."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="translate",
    conf="pkg://trivium_plugins.translate.conf",
    sources={
        "translate": Entry(
            "trivium_plugins.translate.source:Translate",
            "trivium_plugins.translate.config:TranslateConfig",
            help="paragraphs of manual pages in English and German or French, aligned and checked (extra: text)",
        )
    },
    help="paragraphs of manual pages in two languages",
)
