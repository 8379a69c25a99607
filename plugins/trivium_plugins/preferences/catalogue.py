"""What is fetched, from where, under which licence."""

from trivium import FetchEntry

CATALOGUE = {
    "noun": FetchEntry(
        kind="debian",
        package="wordnet-base",
        version="1:3.0-37",
        file="usr/share/wordnet/data.noun",
        sha256="fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
        size=15_300_280,
        licence="WordNet 3.0",
        pool="pool/main/w/wordnet/wordnet-base_3.0-37_all.deb",
    ),
    "verb": FetchEntry(
        kind="debian",
        package="wordnet-base",
        version="1:3.0-37",
        file="usr/share/wordnet/data.verb",
        sha256="adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
        size=2_772_517,
        licence="WordNet 3.0",
        pool="pool/main/w/wordnet/wordnet-base_3.0-37_all.deb",
    ),
    "adj": FetchEntry(
        kind="debian",
        package="wordnet-base",
        version="1:3.0-37",
        file="usr/share/wordnet/data.adj",
        sha256="c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
        size=3_155_427,
        licence="WordNet 3.0",
        pool="pool/main/w/wordnet/wordnet-base_3.0-37_all.deb",
    ),
    "adv": FetchEntry(
        kind="debian",
        package="wordnet-base",
        version="1:3.0-37",
        file="usr/share/wordnet/data.adv",
        sha256="444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
        size=516_696,
        licence="WordNet 3.0",
        pool="pool/main/w/wordnet/wordnet-base_3.0-37_all.deb",
    ),
}
