"""Personal data that has a form of its own, replaced by tags: e-mail, bank account, card, IP address, telephone number.

What can be checked is checked (Luhn's sum of a card, ISO 7064 of an IBAN, an address by `ipaddress`), so that an order
number or a version stays. Names and postal addresses have no such form: this finds none of them.
"""

from __future__ import annotations

import re
from collections import Counter
from ipaddress import IPv6Address, ip_address

EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w@-])"
)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}")
CARD = re.compile(r"(?<![\w.+-])[2-6](?:[ -]?[0-9]){12,18}(?![\w]|[.-][0-9])")
IPV4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|\.[0-9])")
IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f]*:[0-9A-Fa-f]*:)[0-9A-Fa-f:]{1,38}[0-9A-Fa-f](?!\w|:\w)")
PHONE = re.compile(r"(?<![\w+.])\+[1-9](?:[ .-]?\(?[0-9]\)?){6,16}(?![\w]|[.-][0-9])")

IBAN_LENGTHS = {
    code[:2]: int(code[2:])
    for code in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 "
        "FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 "
        "LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SD18 "
        "SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
    ).split()
}
"""Characters of an account number, by country (the registry of ISO 13616)."""


def luhn(digits: str) -> bool:
    """Whether the check digit of a card number is right (ISO/IEC 7812-1, annex B).

    >>> luhn("4111111111111111"), luhn("4111111111111112")
    (True, False)
    """
    doubled = (2 * int(d) if i % 2 else int(d) for i, d in enumerate(reversed(digits)))
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def iban_checks(iban: str) -> bool:
    """Whether the check digits of an account number are right (ISO 13616; remainder 1 by 97).

    >>> iban_checks("GB82WEST12345698765432"), iban_checks("GB83WEST12345698765432")
    (True, False)
    """
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1


def without_pii(text: str) -> tuple[str, Counter[str]]:
    """Text with tags in place of personal data, and how many of each kind there were.

    >>> without_pii("Write to ann@example.org or +44 20 7946 0958.")
    ('Write to <EMAIL> or <PHONE>.', Counter({'email': 1, 'phone': 1}))
    """
    counts: Counter[str] = Counter()

    def put(kind: str) -> str:
        counts[kind] += 1
        return f"<{kind.upper()}>"

    def iban(match: re.Match[str]) -> str:
        found, taken, at = match[0], "", 0
        length = IBAN_LENGTHS.get(found[:2], 0)
        while at < len(found) and len(taken) < length:  # words in capitals may follow it
            taken += found[at].strip()
            at += 1
        after = text[match.start() + at : match.start() + at + 1]
        sound = 0 < length == len(taken) and iban_checks(taken) and not after.isalnum()
        return put("iban") + found[at:] if sound else found

    def card(match: re.Match[str]) -> str:
        digits = re.sub(r"\D", "", match[0])
        return put("card") if luhn(digits) else match[0]

    def address(match: re.Match[str]) -> str:
        try:
            found = ip_address(match[0])
        except ValueError:
            return match[0]
        if found.is_loopback or found.is_unspecified:  # nobody's
            return match[0]
        if isinstance(found, IPv6Address) and (found.is_reserved or found.is_site_local):  # `a::b` is C++ more often
            return match[0]
        return put("ip")

    def phone(match: re.Match[str]) -> str:
        digits = re.sub(r"\D", "", match[0])
        return put("phone") if 8 <= len(digits) <= 15 else match[0]  # E.164

    if "@" in text:
        text = EMAIL.sub(lambda m: put("email"), text)
    if any(c.isdigit() for c in text):
        text = IBAN.sub(iban, text)
        text = IPV4.sub(address, text)
        text = CARD.sub(card, text)
        text = PHONE.sub(phone, text)
    if ":" in text:
        text = IPV6.sub(address, text)
    return text, counts
