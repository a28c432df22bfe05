"""The small table of units, and what counts as one after a number.

A unit of measure is known by its names. Any other English noun in the plural counts things ("42 apples"), unless it
changes the value ("3 halves", "5 dozens"): such words are never dropped.
"""

from __future__ import annotations

import re

# The first name of a line is the one that is compared.
_TABLE = """
mm millimeter millimetre | cm centimeter centimetre | dm decimeter decimetre | m meter metre | km kilometer kilometre
in inch inches | ft foot feet | yd yard | mi mile | mg milligram | g gram gm | kg kilogram kilo | ton tonne
lb pound lbs | oz ounce | ml milliliter millilitre mL | cl centiliter | l liter litre L | gal gallon
qt quart | pt pint
s sec second | ms millisecond | min minute mins | h hr hour hrs | day | week wk
month | year yr | decade | century centuries
degree deg | rad radian | kelvin | N newton | J joule | kJ kilojoule | W watt | kW kilowatt | V volt
A ampere amp
Hz hertz | Pa pascal | kPa | mol mole | ohm | C coulomb | eV | cal calorie | kcal | bit | byte
mph | kmh kmph kph | bps | dollar buck USD usd | cent | euro EUR | yuan RMB | rupee Rs | yen
ruble rouble | pence | penny pennies
unit | people person persons | men man | women woman | child children | box boxes | student | way
mouse mice | half-life
inning | piece | point | time-unit | number | digit | term | side | vertex vertices | edge | face | root | solution
am a.m. AM A.M. | pm p.m. PM P.M. | acre | hectare ha | au | ly
"""
_NAMES = {
    name: names.split()[0]
    for line in _TABLE.strip().splitlines()
    for names in line.split("|")
    for name in names.split()
}
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
# What stands beside a unit and changes nothing.
_FILLERS = {"of", "the", "a", "an", "total", "long", "old", "tall", "wide", "different", "distinct", "possible"}
_VALUE = re.compile(
    r"(?:hundred|thousand|[mbtrqz]\w*ill?i?(?:on|ard)|lakh|crore|mil|mille|tausend|dozen|score|"
    r"grosse?|pair|couple|duo|trio|myriad|googol|\w+uple|"
    r"hal[fv]e?|quarter|third|\w+(?:teen|ty)|\w+(?:[^nm]|on|en)th|ninth|(?:twen|thir|for|fif|six|seven|eigh|nine)tie|"
    r"hundredth|thousandth|millionth|"
    r"time|fold|twice|thrice|double|triple|ten|one|two|three|four|five|sixe?|seven|eight|nine|zeroe?|"
    r"plu|minu|le|more|less|fewer|than|or|and|to|mod|modulo|modulus|over|divided|by|choose|factorial|root|radical|"
    r"percent|percentage|pct|permille|ppm|if|when|for|where|with|without|at|least|most|about|approximately|between|not|"
    r"no|none|wrong|pi|pis|squared|cubed|power|exponent|base|negative|positive|sin|cos|tan|log|ln|exp|versu|per|"
    r"alpha|beta|gamma|delta|theta|lambda|sigma|omega|phi|psi|tau|infinity|unknown|undefined|mean|equal|remain|"
    r"exclude|except|basi|sine|cosine|tangent|inverse|reciprocal|decibel|minu|a|i|other|instead|false)s?",
    re.IGNORECASE,
)
_COUNTED = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORD = re.compile(r"[A-Za-z.]+(?:-[a-z]+)?|[0-9]+|[/^*·]|\S")


def multiplier(word: str) -> int | None:
    """The factor that "million" and the like multiply a number by."""
    return _COUNTED.get(word.strip().lower())


def is_measure(word: str) -> bool:
    """True if a word is in the table of units."""
    return word in _NAMES or (word.endswith("s") and len(word) > 2 and word[:-1] in _NAMES)


def unit(text: str) -> str | None:
    """The one spelling of a unit such as ``cm^2``, ``square centimeters`` or ``km/h``; None for text that is none."""
    names: list[str] = []
    power = 0
    divided = False
    words = _WORD.findall(text.replace("$", " ").replace("\\cdot", "·").replace("{", "").replace("}", ""))
    for place, word in enumerate(words):
        stem = _singular(word)
        if word in ("/", "per") and names:
            divided = True
        elif word in ("*", "·") and names:
            continue
        elif word == "^" and names and words[place + 1 : place + 2] and words[place + 1].isdigit():
            names[-1] += "^" + words[place + 1]
        elif word.isdigit() and place and words[place - 1] == "^":
            continue
        elif word.lower().strip(".") in _POWERS:
            if names and word in ("squared", "cubed"):
                names[-1] += f"^{_POWERS[word]}"
            else:
                power = _POWERS[word.lower().strip(".")]
        elif word.lower() in _FILLERS or (word == "in" and names):
            continue
        elif stem is not None and (is_measure(word.rstrip(".")) or not power):
            names.append(("/" if divided else "") + stem + (f"^{power}" if power else ""))
            power, divided = 0, False
        else:
            return None
    if not names or power or divided:
        return None
    joined = " ".join(names)
    return {"km /h": "kmh", "mi /h": "mph"}.get(joined, joined)


def _singular(word: str) -> str | None:
    """A noun's one name, or None for a word that is no unit."""
    bare = word.rstrip(".") if word not in _NAMES else word
    for name in (bare, bare.lower()) if len(bare) > 2 else (bare,):
        if name in _NAMES:
            return _NAMES[name]
        if name.endswith("s") and len(name) > 3 and name[:-1] in _NAMES:
            return _NAMES[name[:-1]]
    if (
        re.fullmatch(r"[a-z]+(?:-[a-z]+)?", bare) is None
        or len(bare) < 4
        or not bare.endswith("s")
        or bare.endswith("ss")
    ):
        return None
    return None if any(_VALUE.fullmatch(part) for part in bare.split("-")) else bare[:-1]
