"""Each changing step on texts worked out by hand, and that a second pass finds nothing more to do."""

import pytest

from trivium.data.clean_text import change_of
from trivium.data.config import CleaningConfig
from trivium.data.pii import IBAN_LENGTHS, iban_checks, luhn, without_pii

STEPS = {name: change_of(name, CleaningConfig()) for name in ("unicode", "whitespace", "pii")}


@pytest.mark.parametrize(
    ("step", "text", "becomes", "counts"),
    [
        ("unicode", "schÃ¶n", "schön", {"mojibake": 1}),  # ö is C3 B6 in UTF-8, read as Latin-1
        ("unicode", "Cafe\u0301 \u212b", "Café \u00c5", {"not composed": 1}),  # NFC: e + acute, the ångström sign
        ("unicode", "\ufeffa\x00b\x1bc\td\ne\r\nf\x0cg", "abc\td\ne\r\nf\x0cg", {"control characters": 3}),
        ("unicode", "half \ud83d of one", "half \ufffd of one", {"half characters": 1}),
        ("unicode", "“fine” – already…", "“fine” – already…", {}),  # quotes are no mistake
        ("whitespace", "a\r\nb\rc", "a\nb\nc", {"line ends": 2}),
        ("whitespace", "a  \nb\t\n c", "a\nb\n c", {"trailing blanks": 2}),
        ("whitespace", "a\n\n\nb", "a\n\n\nb", {}),  # two blank lines, as between functions
        ("whitespace", "a\n\n\n\nb", "a\n\n\nb", {"blank lines": 1}),
        ("whitespace", "a\n \n\t\n\n\nb", "a\n\n\nb", {"blank lines": 1, "trailing blanks": 2}),
        ("whitespace", "def f():\n    if x:\n\t\treturn  1", "def f():\n    if x:\n\t\treturn  1", {}),
        ("whitespace", " a completion's blanks ", " a completion's blanks ", {}),
    ],
)
def test_step_changes_a_text_as_worked_out(step, text, becomes, counts):
    assert STEPS[step](text) == (becomes, counts)
    assert STEPS[step](becomes) == (becomes, {})


@pytest.mark.parametrize(
    ("text", "becomes", "kinds"),
    [
        ("mail ann.o'x@mail.example.org.", "mail ann.o'<EMAIL>.", "email"),
        ("to: Ann+news@Example.co.uk, bob_1@example.de", "to: <EMAIL>, <EMAIL>", "email email"),
        ("call +44 20 7946 0958 or +1 (202) 555-0143.", "call <PHONE> or <PHONE>.", "phone phone"),
        ("+49 1234567 has nine digits", "<PHONE> has nine digits", "phone"),
        ("from 192.0.2.17:8080, 2001:db8::8a2e:370:7334 and fe80::1.", "from <IP>:8080, <IP> and <IP>.", "ip ip ip"),
        ("2001:0db8:85a3:0000:0000:8a2e:0370:7334", "<IP>", "ip"),
        ("card 4111 1111 1111 1111, 5500-0000-0000-0004, 340000000000009", "card <CARD>, <CARD>, <CARD>",
         "card card card"),
        ("IBAN GB82 WEST 1234 5698 7654 32 IS MINE", "IBAN <IBAN> IS MINE", "iban"),
        ("DE89370400440532013000, FR1420041010050500013M02606", "<IBAN>, <IBAN>", "iban iban"),
    ],
)  # fmt: skip
def test_personal_data_becomes_tags(text, becomes, kinds):
    cleaned, counts = without_pii(text)
    assert cleaned == becomes
    assert sorted(counts.elements()) == sorted(kinds.split())
    assert without_pii(cleaned) == (cleaned, {})


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112 fails Luhn's sum",
        "GB82 WEST 1234 5698 7654 33 fails by 97",
        "GB82 WEST 1234 5698 7654 325 is one too long",
        "256.1.2.3 and 1.2.3 and 1.2.3.4.5 are no addresses; 127.0.0.1, 0.0.0.0 and ::1 are nobody's",
        "std::vector<int> a::b c::d, at 12:30:45, aa:bb:cc:dd:ee:ff",
        "@decorator user@localhost a@b",
        "order 0012345678, 020 7946 0958 without a country, 2024-01-05, +5 degrees, 1+12345678",
        "+1234567 is seven digits, +1234567890123456 is sixteen",
        "pi is 3.14159265358979323846",
    ],
)
def test_what_only_looks_like_personal_data_stays(text):
    assert without_pii(text) == (text, {})


def test_check_digits_known_from_elsewhere():
    """Luhn: the number of Wikipedia's article, with each check digit. IBAN: the registry's examples."""
    assert [d for d in "0123456789" if luhn(f"1789372997{d}")] == ["4"]
    good = "GB29NWBK60161331926819 NL91ABNA0417164300 NO9386011117947 CH9300762011623852957 SE4550000000058398257466"
    for iban in good.split():
        assert iban_checks(iban) and len(iban) == IBAN_LENGTHS[iban[:2]]
        assert not any(iban_checks(iban[:-1] + d) for d in "0123456789" if d != iban[-1])
