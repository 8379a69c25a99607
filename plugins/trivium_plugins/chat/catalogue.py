"""What is fetched, from where, under which licence."""

from trivium import FetchEntry

CATALOGUE = {
    "conversations": FetchEntry(
        kind="wheel",
        package="chitchat-dataset",
        version="0.9.0",
        file="chitchat_dataset/dataset.json",
        sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
        size=40_303_934,
        licence="MIT",
    ),
}
