"""Which option does a reply choose, or which number does it state? Fixed cascades of rules; no model, no randomness.

A reply is read twice. As a *letter* (`parse_letter`), because benchmarks ask for one, and, where no letter is found, as
a *value* (`parse_value`), because many models answer with the option's text ("2.36m") although a letter was asked for.
Each rule may find no letter, one, or several; the first rule that finds any decides, and several different ones at the
same rule make the reply unparsable: nothing is guessed.

Before any rule, the part of the reply that holds the answer is cut out:
    reasoning       what stands before the last `</think>` is dropped; a `<think>` that never ends leaves no answer
    container       the content of the last `<answer>...</answer>`, else of the last `\\boxed{...}`, replaces the reply
    decoration      `*`, backticks, `#`, `$` and LaTeX's `\\text{}` go; Unicode is folded (NFKC), minus signs become "-"

Letter rules, in order; "B" stands for any letter that the question has:
    statement       "The answer is (B)", "Answer: B", "Option B", "B is correct", "I choose B". The last "answer is"
                    wins, since a reply may correct itself; the weaker forms must agree; "B is wrong" does not count
    whole           the whole reply is the letter: "B", "b", "(B)", "B.", "[B]"
    last_line       the last line is only the letter
    leading         a line begins with the letter and a delimiter ("B) left", "B. left", "B: left", "(B) left",
                    "B - left"), is only the letter, or is it and the option's own text ("B left"); all must agree
    bracketed       one bracketed capital anywhere: "It moves to the left (B)."
    lone            one single capital in a reply of at most five words: "I think B"
The last two rules are left out for a reply that is an option's text, such as "Camera C moves".
"A" and "I" are words too: where nothing delimits them ("A car moves left", "The answer is A car"), they are no letters.

Value rules, in order:
    equal           the whole reply is an option's text
    stated_value    what follows the last "answer is" / "answer:" is an option's text, or contains exactly one
    last_line_value the last line is an option's text
    contained       the reply contains exactly one option's text as a whole phrase; the longest wins where they overlap
                    ("front left" hides "left"), and "not left" is no "left"
Texts are compared without case, spaces, quotes and a final period. Options that are a number with or without a unit are
compared as numbers: 2.36m = "2.36 m" = "2.360 meters", m/s² = m/s^2; the unit must be the same, but a bare number will
do where all numeric options have one unit. Where the options have none, a reply may add s, m, m/s, m/s² or degrees
("How many seconds ...?" "8 s"), but a number with a unit inside a longer reply is not taken for an option without one.

A question without options asks for a number (`parse_number`). Mentions of frames ("frame 7 of 32") are left out, then
these rules follow each other:
    statement       what follows the last "answer is" / "answer:" begins with a number, or contains exactly one
    whole           the whole reply is a number: "1.6", "about 1.6 m", "three"
    last_line       the last line is only a number
    with_unit       the reply contains exactly one number with a unit: "In 2 steps it moved 1.6 meters"
    single          the reply contains exactly one number in digits
Lengths are converted to the unit that was asked for; a number with a unit of another kind does not count. Ranges ("1-2 m",
"1 or 2") are several numbers; bounds ("less than 2 m", "2+"), fractions ("1/2", "half a meter") and decimal commas are none.

A letter always goes before a value. So "B) left" is B even if "left" is the text of A, and a reply that is right by
its letter is right under both scorings.
"""

import re
import string
import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class ParsedAnswer:
    """What a reply chose.

    Attributes:
        letter (`str`, *optional*): "A" for the first option, and so on; `None` if no single option was found.
        rule (`str`): the rule that decided, `"ambiguous:<rule>"` if that rule found several options, or `"none"`.
    """

    letter: str | None
    rule: str


@dataclass(frozen=True)
class ParsedNumber:
    """Which number a reply stated.

    Attributes:
        number (`float`, *optional*): `None` if no single number was found.
        rule (`str`): the rule that decided, `"ambiguous:<rule>"` if that rule found several numbers, or `"none"`.
    """

    number: float | None
    rule: str


UNPARSED = ParsedAnswer(None, "none")

# --------------------------------------------------------------------------------------------------------------------
# The part of the reply that holds the answer
# --------------------------------------------------------------------------------------------------------------------


_CHINESE_MARKS = {
    "。": ". ",
    "、": ", ",
    "，": ", ",
    "：": ": ",
    "；": "; ",
    "【": "[",
    "】": "]",
    "「": '"',
    "」": '"',
}


def fold(text: str) -> str:
    """Folds Unicode variants: full-width letters, Chinese punctuation, superscripts (m/s² -> m/s2), minus signs, the x of
    a product."""
    for mark, ascii_mark in _CHINESE_MARKS.items():
        text = text.replace(mark, ascii_mark)
    for dash in "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d":
        text = text.replace(dash, "-")
    return unicodedata.normalize("NFKC", text.replace("\u00d7", "x"))


def answer_part(reply: str) -> str:
    """Cuts the reasoning, the container and the decoration away; see the module's docstring."""
    reply = fold(reply)
    reply = reply.rsplit("</think>", 1)[-1]
    if "<think>" in reply:
        return ""
    tagged = re.findall(r"<answer>(.*?)</answer>", reply, flags=re.DOTALL | re.IGNORECASE)
    reply = tagged[-1] if tagged else re.sub(r"</?answer>", " ", reply, flags=re.IGNORECASE)
    reply = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", reply)
    boxed = re.findall(r"\\boxed\s*\{([^{}]*)\}", reply)
    if boxed:
        reply = boxed[-1]
    reply = re.sub(r"\\[ ,;!]", " ", reply)  # LaTeX spaces: 2.36\ m
    reply = re.sub(r"[*`#$]|__", "", reply)
    return reply.strip()


# --------------------------------------------------------------------------------------------------------------------
# Letters
# --------------------------------------------------------------------------------------------------------------------

_STATED = re.compile(
    r"(?:\b(?:answer(?:\s+(?:choice|option|letter))?|ans|(?:correct|right|best)\s+(?:option|choice)|(?:my|final)\s+choice"
    r"|(?:final|prediction|choice)(?=[\"']?\s*[:=]))"
    r"(?:\s+(?:to|for)\s+(?:the|this|that)\s+question)?"
    r"[\"']?\s*(?:is\b\s*[:=]?|[:=]|would\s+be\b|should\s+be\b|must\s+be\b|-(?=\s))"
    r"|(?:答案|正确选项)\s*(?:应该?)?(?:是|为|选)?(?:选项)?\s*[:=]?)\s*",
    flags=re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"(?:\b(?:option|choice|choose|chose|select|pick|go\s+with|letter)[ \t]*:?[ \t]+|(?:选项|选择|选)[ \t]*:?[ \t]*)"
    r"(?=[\(\[\"']?[A-Za-z](?![A-Za-z0-9_]))",
    flags=re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(?:the\s+)?(?:(?:option|choice|letter)\s*:?\s*)?"
    r"(?:(?P<open>[\(\[\{\"'])\s*)?(?P<letter>[A-Za-z])(?![A-Za-z0-9_'\u00b0]|-\w)\s*(?P<close>[\)\]\}\"'])?",
    flags=re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\s*(?P<join>,\s*(?:or|and)\b|[,/&+]|\bor\b|\band\b)\s*(?:option\s+)?[\(\[]?(?P<letter>[A-Z])(?![\w'])[\)\]]?"
)
_CONNECTIVE = re.compile(r"(?:because|since|as|based|due|given|for|which|with|is|from)\b")
_DENIED_BEFORE = re.compile(
    r"(?:\bnot|n't|\bneither|\bnor|\brather\s+than|\binstead\s+of|\bexcept|\bexcludes?|\beliminates?)\s+(?:option\s+)?[\(\[]?$",
    flags=re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"\s*(?:(?:is|are|was|seems|looks|can\s+be)\s+(?:also\s+|clearly\s+)?"
    r"(?:not|incorrect|wrong|false|impossible|ruled\s+out|eliminated)\b"
    r"|(?:isn't|cannot|can't|doesn't|does\s+not)\b|是?(?:不|错))",
    flags=re.IGNORECASE,
)
_CORRECT = re.compile(
    r"(?<![A-Za-z0-9_'-])[\(\[]?(?P<letter>[A-Z])[\)\]]?(?:\s+(?:is|was|would\s+be|seems|must\s+be)\s+(?:the\s+)?"
    r"(?:most\s+likely\s+)?(?:most\s+|only\s+)?(?:correct|right|best|true|accurate|appropriate|answer)\b|是?正确)"
)
_BRACKETED = re.compile(r"[\(\[]\s*(?P<letter>[A-Z])\s*[\)\]]")
_LONE = re.compile(r"(?<![\w'\u00b0-])(?P<letter>[A-Z])(?![\w'\u00b0-])")
_LINE_MARK = re.compile(
    r"^\s*(?:-\s+)?(?:(?:option|choice)\s+)?(?:[\(\[](?P<inside>[A-Za-z])[\)\]][.:,]?|(?P<bare>[A-Za-z])(?:[\).:,]|\s-)(?=\s|$))",
    flags=re.IGNORECASE,
)


def _letters_at(text: str, valid: str) -> set[str]:
    """The letters that `text` begins with ("(B) left" -> {B}, "B or C" -> {B, C}, "A car" -> {})."""
    match = _TOKEN.match(text)
    if match is None:
        return set()
    letter, rest = match["letter"], text[match.end() :]
    if letter.upper() not in valid:
        return set()
    closed = match["close"] is not None or not rest.strip() or rest[0] in ".,;:!?\n)" or rest[0] > "\u2e80"
    closed = closed or rest.startswith("- ")
    word_like = letter.islower() or letter in "AI"
    named = match.group().lower().startswith(("option", "choice", "letter", "the option"))
    others = _hedged(rest, valid)
    if word_like and not closed and not others:
        if letter in "ai" or not (named or (letter.isupper() and _CONNECTIVE.match(rest))):
            return set()
    return {letter.upper()} | others


def _hedged(rest: str, valid: str) -> set[str]:
    """Further letters that a text goes on with: ", C" or " or (C)". Not "B, C is wrong", and not "B, A car"."""
    letters: set[str] = set()
    match = _HEDGE.match(rest)
    while match and match["letter"] in valid:
        rest = rest[match.end() :]
        if re.match(r"\s+\w", rest) and (match["join"] == "," or match["letter"] in "AI") and not _HEDGE.match(rest):
            break
        letters.add(match["letter"])
        match = _HEDGE.match(rest)
    return letters


def _statement(text: str, valid: str) -> set[str]:
    """Letters of the last "answer is", else all letters that the weaker forms name."""
    last: set[str] = set()
    for match in _STATED.finditer(text):
        last = _letters_at(text[match.end() :], valid) or last
    if last:
        return last
    found: set[str] = set()
    for match in _CHOSEN.finditer(text):
        rest = text[match.end() :]
        letters = _letters_at(
            "option " + rest if match.group().lower().startswith(("option", "choice")) else rest, valid
        )
        token = _TOKEN.match(rest)
        denied = _DENIED_BEFORE.search(text[: match.start()]) or (token and _DENIED_AFTER.match(rest[token.end() :]))
        if not denied:
            found |= letters
    for match in _CORRECT.finditer(text):
        if match["letter"] in valid and not _DENIED_BEFORE.search(text[: match.start()]):
            found.add(match["letter"])
    return found


def _only_a_letter(line: str, valid: str) -> set[str]:
    """The letter(s) that a line consists of: "B", "(b).", "Option B", "A or B"."""
    bare = line.strip().strip(" .:;!").strip()
    match = re.fullmatch(r"(?:(?:option|choice)\s+)?[\(\[\"']{0,2}([A-Za-z])[\)\]\"']*", bare, flags=re.IGNORECASE)
    if match:
        return {match[1].upper()} & set(valid)
    several = re.fullmatch(
        r"[\(\[]?[A-Z][\)\]]?(?:(?:\s*(?:,|/|&|\+)\s*|\s+(?:or|and)\s+|\s*,\s*(?:or|and)\s+)[\(\[]?[A-Z][\)\]]?)+", bare
    )
    letters = set(re.findall(r"\b[A-Z]\b", bare)) if several else set()
    return letters if letters & set(valid) else set()  # "N/A" is no A


def _leading(text: str, options: list[str], valid: str) -> set[str]:
    """Letters that begin a line, with a delimiter or with the option's own text after them."""
    found: set[str] = set()
    for line in text.splitlines():
        match = _LINE_MARK.match(line)
        alone = _only_a_letter(line, valid)
        if alone:
            found |= alone
        elif match:
            letter = (match["inside"] or match["bare"]).upper()
            if letter in valid and not _DENIED_AFTER.match(line[match.end() :]):
                found.add(letter)
                found |= _hedged(line[match.end() - 1 :], valid) or _hedged(line[match.end() :], valid)
                found |= _echoed(line, options, valid)
        elif line[:1] in valid and line[1:2] == " " and compact(line[1:]) == compact(options[valid.index(line[0])]):
            found.add(line[0])
    return found


def _echoed(line: str, options: list[str], valid: str) -> set[str]:
    """Letters of a line that repeats the list of options from A on, each with its text: "(A) left (B) right"."""
    marks = list(re.finditer(r"(?<!\w)[\(\[]?(?P<letter>[A-Z])[\)\].:]\s*", line))
    echoed = []
    for match in marks:
        if match["letter"] in valid and compact(line[match.end() :]).startswith(
            compact(options[valid.index(match["letter"])])
        ):
            echoed.append(match["letter"])
    return set(echoed) if echoed[:2] == ["A", "B"] else set()


def _bracketed(text: str, valid: str) -> set[str]:
    return {
        match["letter"]
        for match in _BRACKETED.finditer(text)
        if match["letter"] in valid and not _DENIED_BEFORE.search(text[: match.start()])
    }


def _lone(text: str, valid: str) -> set[str]:
    if len(text.split()) > 5:
        return set()
    found = set()
    for match in _LONE.finditer(text):
        before, after = text[: match.start()], text[match.end() :]
        is_word = match["letter"] in "AI" and re.match(r"\s+(?!or\b|and\b|nor\b)\w", after)
        is_unit = re.search(r"\d\s*$", before)
        if match["letter"] in valid and not is_word and not is_unit and not _DENIED_BEFORE.search(before):
            found.add(match["letter"])
    return found


def parse_letter(reply: str, options: list[str]) -> ParsedAnswer:
    """Reads a reply as a letter, by the letter rules of the module's docstring.

    Args:
        reply (`str`): the model's whole reply.
        options (`list[str]`): the options' texts in the order that was shown; their number tells the valid letters.
    Returns: [`ParsedAnswer`].
    """
    text = answer_part(reply)
    if not text:
        return UNPARSED
    valid = LETTERS[: len(options)]
    last_line = text.splitlines()[-1]
    rules = [
        ("statement", lambda: _statement(text, valid)),
        ("whole", lambda: _only_a_letter(text, valid)),
        ("last_line", lambda: _only_a_letter(last_line, valid)),
        ("leading", lambda: _leading(text, options, valid)),
    ]
    if not _equal(text, options):  # "Camera C moves" may be an option's text: then its C is no choice
        rules += [("bracketed", lambda: _bracketed(text, valid)), ("lone", lambda: _lone(text, valid))]
    return _first_that_decides(rules)


# --------------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------------

_UNITS = {
    "m": "m meter meters metre metres 米",
    "cm": "cm centimeter centimeters centimetre centimetres 厘米",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "km": "km kilometer kilometers kilometre kilometres",
    "ft": "ft foot feet",
    "in": "inch inches",
    "s": "s sec secs second seconds 秒",
    "m/s": "m/s mps meters/second metres/second m/sec",
    "m/s2": "m/s2 m/s^2 m/s^{2} m/s/s m/sec2 m/sec^2",
    "km/h": "km/h kph kmh km/hr",
    "deg": "\u00b0 deg degs degree degrees",
    "deg/s": "\u00b0/s deg/s degrees/s degrees/second \u00b0/sec",
    "rad": "rad radian radians",
    "rad/s": "rad/s radians/s radians/second",
    "%": "% percent",
    "fps": "fps",
}
_UNIT_OF = {spelling: unit for unit, spellings in _UNITS.items() for spelling in spellings.split()}
_PLAIN_UNITS = ("s", "m", "m/s", "m/s2", "deg")  # what a question means that names a unit and asks for a bare number
_LONG_UNITS = (  # spelled over several words; folded to one before numbers are looked for
    (
        re.compile(
            r"\b(?:meters?|metres?)\s+per\s+second\s+squared\b|\b(?:meters?|metres?)\s+per\s+second\s+per\s+second\b"
        ),
        "m/s2",
    ),
    (re.compile(r"\b(?:meters?|metres?)\s+per\s+second\b"), "m/s"),
    (re.compile(r"\bkilomet(?:er|re)s?\s+per\s+hour\b"), "km/h"),
    (re.compile(r"\bdegrees?\s+per\s+second\b"), "deg/s"),
    (re.compile(r"\bradians?\s+per\s+second\b"), "rad/s"),
)
_UNIT_PATTERN = "|".join(sorted((re.escape(s) for s in _UNIT_OF), key=len, reverse=True))
_QUANTITY = re.compile(
    rf"(?<![\w.,/^])(?<!\d-)(?P<number>[+-]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|[+-]?\.\d+)"
    rf"(?:\s*(?P<unit>{_UNIT_PATTERN})(?![\w/^]))?(?![\w%])(?!\.\d|-\d)"
)
_NUMBER_WORDS = dict(
    zip("zero one two three four five six seven eight nine ten eleven twelve".split(), range(13), strict=True)
)


def compact(text: str) -> str:
    """The form in which texts are compared: folded, lower case, without spaces, quotes and a final period or comma."""
    return re.sub(r"[\s\"'\u2018\u2019\u201c\u201d*`#$]+", "", fold(text)).casefold().rstrip(".,;:!")


def _fold_units(text: str) -> str:
    text = fold(text).casefold()
    for pattern, unit in _LONG_UNITS:
        text = pattern.sub(unit, text)
    return text


def quantity(text: str) -> tuple[float, str] | None:
    """`(number, unit)` if the whole text is a number with a known unit, or a bare number (unit ""); else `None`."""
    text = _fold_units(text).strip().rstrip(".")
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    return float(match["number"].replace(",", "")), _UNIT_OF[match["unit"]] if match["unit"] else ""


def _quantities(text: str) -> set[tuple[float, str]]:
    """Every number of a text with its unit; the unit is "" for a bare number."""
    return {
        (float(match["number"].replace(",", "")), _UNIT_OF[match["unit"]] if match["unit"] else "")
        for match in _QUANTITY.finditer(_fold_units(text))
    }


def _equal(text: str, options: list[str]) -> set[int]:
    """Options whose text this is: letter for letter if there is one, else after normalisation, else as a number."""
    exact = {i for i, option in enumerate(options) if option.strip() == text.strip()}
    if exact:
        return {min(exact)} if len({options[i].strip() for i in exact}) == 1 else exact
    key = compact(text)
    same = {i for i, option in enumerate(options) if key and compact(option) == key}
    if same:
        return same
    amount = quantity(text)
    word = re.fullmatch(r"([a-z]+)(?:\s+times?)?", text.casefold().strip(" .!"))
    if amount is None and word and word[1] in _NUMBER_WORDS:
        amount = (float(_NUMBER_WORDS[word[1]]), "")
    if amount is None:
        return set()
    amounts = [quantity(option) for option in options]
    units = {a[1] for a in amounts if a is not None}
    if amount[1] == "" and len(units) == 1:  # "2.36" where all options are in metres
        amount = (amount[0], next(iter(units)))
    elif units == {""} and amount[1] in _PLAIN_UNITS:  # "8 s" where the unit stands in the question alone
        amount = (amount[0], "")
    return {i for i, a in enumerate(amounts) if a == amount}


def _phrase(option: str) -> re.Pattern | None:
    """A pattern that finds the option's text as a whole phrase, whether its words are joined by spaces or hyphens."""
    words = re.findall(r"[^\s-]+", fold(option).casefold().strip().rstrip(".,;:!"))
    if not words or (len(words) == 1 and len(words[0]) == 1):  # a single letter is no phrase: "a" is in every sentence
        return None
    return re.compile(r"(?<![\w-])" + r"[\s-]*".join(map(re.escape, words)) + r"(?![\w-])")


_DENIED_VALUE = re.compile(
    r"(?:\bnot|\bno|n't|\bnever|\bneither|\bnor|\brather\s+than|\binstead\s+of)\s+(?:(?!but\b|and\b|so\b|then\b)\w+\s+){0,2}$"
)


def _contained(text: str, options: list[str]) -> set[int]:
    """Options that occur in the text; one that lies inside a longer one's occurrence, or is denied, does not count."""
    found: set[int] = set()
    amounts = {i: a for i, a in enumerate(map(quantity, options)) if a is not None}
    present = _quantities(text)
    found |= {i for i, amount in amounts.items() if amount in present}
    folded = re.sub(r"\s+", " ", fold(text).casefold())
    spans: list[tuple[int, int, int]] = []
    for i, option in enumerate(options):
        pattern = _phrase(option) if i not in amounts else None
        if pattern is not None:
            spans += [
                (m.start(), m.end(), i)
                for m in pattern.finditer(folded)
                if not _DENIED_VALUE.search(folded[: m.start()])
            ]
    for start, end, i in spans:
        if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans):
            found.add(i)
    return found


def parse_value(reply: str, options: list[str]) -> ParsedAnswer:
    """Reads a reply as the text of an option, by the value rules of the module's docstring.

    Options with the same text count as one; the first of them is returned.

    Args:
        reply (`str`): the model's whole reply.
        options (`list[str]`): the options' texts in the order that was shown.
    Returns: [`ParsedAnswer`].
    """
    text = answer_part(reply)
    if not text:
        return UNPARSED
    first_with = {}
    for i, option in enumerate(options):
        first_with.setdefault(option.strip(), i)

    def letters(indices: set[int]) -> set[str]:
        return {LETTERS[first_with[options[i].strip()]] for i in indices}

    stated = [text[match.end() :] for match in _STATED.finditer(text)]
    tail = stated[-1].strip().splitlines()[0] if stated and stated[-1].strip() else ""
    last_line = text.splitlines()[-1]
    rules = (
        ("equal", lambda: letters(_equal(text, options))),
        ("stated_value", lambda: letters(_equal(tail, options) or _contained(tail, options)) if tail else set()),
        ("last_line_value", lambda: letters(_equal(last_line, options))),
        ("contained", lambda: letters(_contained(text, options))),
    )
    return _first_that_decides(rules)


def _decide(rules) -> tuple[Any, str]:
    """What the first rule that finds anything found, and its name; `None` where it found several things."""
    for name, rule in rules:
        found = rule()
        if len(found) == 1:
            return found.pop(), name
        if found:
            return None, f"ambiguous:{name}"
    return None, "none"


def _first_that_decides(rules) -> ParsedAnswer:
    return ParsedAnswer(*_decide(rules))


def parse_letter_or_value(reply: str, options: list[str]) -> ParsedAnswer:
    """Reads a reply as a letter and, only where the letter rules find nothing at all, as a value.

    A reply that names several letters stays unparsable, whatever values it mentions.
    """
    parsed = parse_letter(reply, options)
    return parse_value(reply, options) if parsed == UNPARSED else parsed


PARSERS = {"letter": parse_letter, "letter_or_value": parse_letter_or_value}  # the two scorings of a choice

# --------------------------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------------------------

_METERS = {"m": (1, 1), "cm": (1, 100), "mm": (1, 1000), "km": (1000, 1), "ft": (3048, 10000), "in": (254, 10000)}
_FRAMES = re.compile(r"\bframes?\s+#?\d+(?:\s*(?:of|to|and|through|-)\s*(?:frame\s+)?#?\d+(?![\d.]))*", flags=re.ASCII)
_AMOUNT = re.compile(
    rf"(?<![\w.,/^:\u2044])(?<![a-z]-)(?:(?<!point )(?P<word>{'|'.join(_NUMBER_WORDS)})(?!\s+point\b|-?\s*(?:half|thirds?|quarters?)\b)"
    rf"|(?P<digits>[+-]?(?:(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?))"
    rf"(?:[ \t]*-?[ \t]*(?P<unit>{_UNIT_PATTERN})(?![\w/^]))?"
    rf"(?![\w/^:\u2044]|[.,]\d|\s+\d+[/\u2044]\d|\s+(?:and\s+a\s+half|hundred|thousand|dozen)\b)",
    flags=re.ASCII,
)
_HEDGED_NUMBER = re.compile(
    r"(?:(?:it\s+is|about|approximately|approx\.?|around|roughly|nearly|\\approx|\\sim|[~\u2248:=约])\s*)*"
)
_JOINED = re.compile(r"\s*(?:-|~|\u00b1|\+/-|to|or|and|到|至|或)\s*")
_NO_VALUE_BEFORE = re.compile(
    r"(?:\b(?:less|more|fewer|greater|shorter|longer|closer|farther|further|larger|smaller)\s+than|\bat\s+(?:least|most)"
    r"|\b(?:under|over|above|below|within|beyond|exceeds?|up\s+to)|[<>\u2264\u2265]=?|\bnot|n't)\s*(?:about\s+)?$"
)
_NO_VALUE_AFTER = re.compile(r"\s*(?:\+(?!/)|or\s+(?:more|less|so\s+more)\b)")


@dataclass(frozen=True)
class _Amount:
    value: float
    unit: str
    is_word: bool
    start: int
    end: int


def _amounts(text: str, unit: str) -> list[_Amount]:
    """The numbers of a folded text in `unit`, in their order; those of another kind, denied ones and bounds left out."""
    matches = list(_AMOUNT.finditer(text))
    units = [_UNIT_OF[match["unit"]] if match["unit"] else "" for match in matches]
    for i in reversed(range(len(matches) - 1)):  # "1 to 2 m": both are metres
        if not units[i] and _JOINED.fullmatch(text[matches[i].end() : matches[i + 1].start()]):
            units[i] = units[i + 1]
    amounts = []
    for match, own in zip(matches, units, strict=True):
        value = float(_NUMBER_WORDS[match["word"]]) if match["word"] else float(match["digits"].replace(",", ""))
        if own in _METERS and unit in _METERS:
            value = value * _METERS[own][0] * _METERS[unit][1] / (_METERS[own][1] * _METERS[unit][0])
        elif own and unit and own != unit:
            continue
        if not _NO_VALUE_BEFORE.search(text[: match.start()]) and not _NO_VALUE_AFTER.match(text[match.end() :]):
            amounts.append(_Amount(value, own, match["word"] is not None, match.start(), match.end()))
    return amounts


def _values(amounts: list[_Amount]) -> set[float]:
    """Those with a unit, or else those in digits."""
    return {a.value for a in amounts if a.unit} or {a.value for a in amounts if not a.is_word}


def _only_a_number(line: str, unit: str) -> set[float]:
    line = line.strip().rstrip(" .!")
    amounts = _amounts(line, unit)
    whole = len(amounts) == 1 and amounts[0].end == len(line) and _HEDGED_NUMBER.fullmatch(line[: amounts[0].start])
    return {amounts[0].value} if whole else set()


def _stated_number(text: str, unit: str) -> set[float]:
    """The number(s) after the last "answer is" that has any: the one that it begins with, or else all of its line."""
    for match in reversed(list(_STATED.finditer(text))):
        rest = text[match.end() :].strip()
        line = rest.splitlines()[0] if rest else ""
        amounts = _amounts(line, unit)
        if not amounts:
            continue
        if not _HEDGED_NUMBER.fullmatch(line[: amounts[0].start]):
            return _values(amounts)
        found = {amounts[0].value}
        for one, other in pairwise(amounts):
            if not _JOINED.fullmatch(line[one.end : other.start]):
                break
            found.add(other.value)
        return found
    return set()


def parse_number(reply: str, unit: str = "") -> ParsedNumber:
    """Reads a reply as a number, by the number rules of the module's docstring.

    Args:
        reply (`str`): the model's whole reply.
        unit (`str`, defaults to `""`): what the question asks for, such as `"m"`: lengths are converted to it, and numbers
            with a unit of another kind do not count. `""`: a number counts with any unit, unconverted.
    Returns: [`ParsedNumber`].
    Raises: `ValueError` for an unknown unit.
    """
    if unit and unit not in _UNITS:
        raise ValueError(f"unit must be one of {', '.join(_UNITS)}, or empty, not {unit!r}")
    text = _FRAMES.sub("", _fold_units(answer_part(reply))).strip()
    if not text:
        return ParsedNumber(None, "none")
    rules = (
        ("statement", lambda: _stated_number(text, unit)),
        ("whole", lambda: _only_a_number(text, unit)),
        ("last_line", lambda: _only_a_number(text.splitlines()[-1], unit)),
        ("with_unit", lambda: {a.value for a in _amounts(text, unit) if a.unit}),
        ("single", lambda: _values(_amounts(text, unit))),
    )
    return ParsedNumber(*_decide(rules))
