"""Multiple-choice questions built from held-out text, for models that are too small for the paper's tasks.

| task                          | modelled on                   | question                            | chance |
|-------------------------------|-------------------------------|-------------------------------------|--------|
| `continuation_items("code")`  | HellaSwag (arXiv 1905.07830)  | which lines come next?              | 1/4    |
| `continuation_items("prose")` | HellaSwag                     | how does this sentence end?         | 1/4    |
| `identifier_items()`          | WinoGrande (arXiv 1907.10641) | which of two variables stands here? | 1/2    |

Items are text, not token ids: every model answers the same ones, whatever its tokenizer. Contexts end and choices begin
at white space, where byte-level tokenizers split anyway: the tokens of `context` are the first tokens of
`context + choice`. No two items of a task overlap, and no two true choices end alike.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

from transformers import PreTrainedModel

from ..checkpoint import load_tokenizer
from ..data import default_sources, documents
from .multiple_choice import MultipleChoice, multiple_choice

_CONTEXT = (100, 200)  # characters: about 25 to 64 tokens
_CONTINUATION = (30, 90)  # characters: about 8 to 24 tokens
_SIMILAR = 1.15  # lengths of choices and truth differ by at most this factor
_NEARBY = 12  # distractors are drawn from this many candidates, the nearest in the document
_WORDS = 4  # a sentence is cut where at least this many words are on either side


def choice_tasks(sources: Mapping[str, str], n: int = 150, seed: int = 0) -> dict[str, list[MultipleChoice]]:
    """Label -> `n` items: a continuation task per text, and `"identifiers"` if the embedded code is among them.

    Args:
        sources: label -> source, as :func:`~greedy_helpers.data.default_sources` returns them. The text `"code"`
            becomes the task `"code choices"`.
    """
    tasks = {f"{label} choices": continuation_items(source, n, seed=seed) for label, source in sources.items()}
    return tasks | ({"identifiers": identifier_items(n, seed=seed)} if "code" in sources.values() else {})


def choice_judge(n: int = 150, seed: int = 0) -> Callable[[str], Callable[[PreTrainedModel], dict[str, float]]]:
    """For `extra` of :func:`~greedy_helpers.compare.sweep`: adds accuracies to the rows of a sweep.

    Returns:
        model name -> (model -> {task: accuracy in [0, 1]}), the tasks being :func:`choice_tasks` of the model's
        :func:`~greedy_helpers.data.default_sources`, the accuracy
        `acc_norm`. Items are built and the tokenizer is loaded once per name.
    """

    def of_model(name: str) -> Callable[[PreTrainedModel], dict[str, float]]:
        tasks, tokenizer = choice_tasks(default_sources(name), n, seed), load_tokenizer(name)
        return lambda model: {task: multiple_choice(model, tokenizer, items).acc_norm for task, items in tasks.items()}

    return of_model


def continuation_items(source: str = "code", n: int = 150, *, seed: int = 0) -> list[MultipleChoice]:
    """`n` questions with four choices from the held-out split of any source of :mod:`greedy_helpers.data`.

    Code goes on by whole lines as they are, one or more up to 30 characters; other text by a sentence's end of at least
    four words after its beginning, white space made single. The distractors are what goes on at other places of the
    same document (of those beside it, where it is short): places of the same kind (after the same line breaks and
    indentation, or within a sentence), of similar length (a factor of 1.15 at most), and nearby (drawn from the twelve
    nearest), so that neither length nor topic gives the answer away. None of them overlaps with the item, equals the
    truth, or stands in the context.

    Args:
        seed: of the places, the distractors, and the order of the choices.

    Raises:
        ValueError: the held-out text has fewer than `n` such places.
    """

    def items(draw: random.Random) -> Iterator[MultipleChoice]:
        sites = _sites(source, _line_sites if source == "code" else _sentence_sites)
        for document, site in _apart(sites, draw):
            if len(others := _distractors(site, sites, document)) >= 3:
                texts = [site.text, *draw.sample(others, 3)]
                order = draw.sample(range(4), 4)
                choices = tuple(site.lead + texts[i] for i in order)
                yield MultipleChoice(site.context.lstrip("\n"), choices, order.index(0))

    return _first(n, items(random.Random(seed)), f"continuation_items({source!r})")


def identifier_items(n: int = 150, *, seed: int = 0) -> list[MultipleChoice]:
    """`n` questions of held-out code: which of two local variables stands here?

    The context is a function's code up to a place where a variable is read; both choices are variables of that function
    which an earlier line of the context names (not `self` or `cls`), followed by the code that really follows, up to
    the end of a line.

    A choice is scored whole, name and what follows. WinoGrande scores only what follows ("partial evaluation"), because
    its names say nothing about the sentence; a variable has been introduced by the context and is part of the question.
    On the embedded models whole scores are more accurate.

    Raises:
        ValueError: this Python's held-out modules have fewer than `n` such places.
    """

    def items(draw: random.Random) -> Iterator[MultipleChoice]:
        for _, site in _apart(_sites("code", _variable_sites), draw):
            texts = [site.text, draw.choice(site.rivals)]
            draw.shuffle(texts)
            yield MultipleChoice(site.context, tuple(site.lead + text for text in texts), texts.index(site.text))

    return _first(n, items(random.Random(seed)), "identifier_items")


@dataclass(frozen=True)
class _Site:
    """A place in a document where a text goes on. Positions count lines or words."""

    first: int  # where the context begins
    begin: int  # where the continuation begins
    end: int  # behind the continuation
    context: str
    lead: str  # the white space between the two
    text: str
    rivals: tuple[str, ...] = ()  # texts that could stand there as well


def _sites(source: str, find: Callable[[str], Iterator[_Site]]) -> list[list[_Site]]:
    return [list(find(text)) for text in documents(source, "test")["text"]]


def _first(n: int, items: Iterator[MultipleChoice], call: str) -> list[MultipleChoice]:
    if n < 1:
        raise ValueError(f"{call}: expected n >= 1, found {n}")
    first = list(islice(items, n))
    if len(first) < n:
        raise ValueError(f"{call}: expected {n} places in the held-out split, found {len(first)}")
    return first


def _apart(sites: Sequence[Sequence[_Site]], draw: random.Random) -> Iterator[tuple[int, _Site]]:
    """(document, site) in random order, without those that overlap with an earlier one or a copy of it."""
    places = [(document, site) for document, of_document in enumerate(sites) for site in of_document]
    draw.shuffle(places)
    taken: dict[int, list[_Site]] = {}
    tails = set()
    for document, site in places:
        earlier, tail = taken.setdefault(document, []), site.text[-_CONTINUATION[0] :]
        if tail not in tails and not any(site.first < other.end and other.first < site.end for other in earlier):
            earlier.append(site)
            tails.add(tail)
            yield document, site


def _distractors(site: _Site, sites: Sequence[Sequence[_Site]], document: int) -> list[str]:
    """The nearest texts of other sites that could stand at this one, of other documents only where they are lacking."""
    texts: dict[str, None] = {}
    for distance in range(len(sites)):
        for neighbour in sorted({document - distance, document + distance}):
            if not 0 <= neighbour < len(sites):
                continue
            fitting = [
                other
                for other in sites[neighbour]
                if other.lead == site.lead
                and len(other.text) <= _SIMILAR * len(site.text)
                and len(site.text) <= _SIMILAR * len(other.text)
                and not (distance == 0 and other.begin < site.end and site.first < other.end)
                and other.text != site.text
                and other.text not in site.context
            ]
            one_per_end: dict[int, str] = {}  # the ends of one sentence contain each other
            for other in sorted(fitting, key=lambda other: abs(other.begin - site.begin)):
                one_per_end.setdefault(other.end, other.text)
            texts |= dict.fromkeys(one_per_end.values())
        if len(texts) >= 3:
            break
    return list(texts)[:_NEARBY]


def _site(parts: Sequence[str], begin: int, end: int, joint: str, after: str, top: int = 0) -> Iterator[_Site]:
    """The place where `after` goes on from `parts[top:begin]`, if both have the right length."""
    text, first, length = after.strip(), begin, -len(joint)
    if not _CONTINUATION[0] <= len(text) <= _CONTINUATION[1]:
        return
    while first > top and (length := length + len(joint) + len(parts[first - 1])) <= _CONTEXT[1]:
        first -= 1
    before = joint.join(parts[first:begin])
    context = before.rstrip()
    if len(context.strip()) >= _CONTEXT[0]:
        lead = before[len(context) :] + after[: -len(after.lstrip())]
        yield _Site(first, begin, end, context, lead, text)


def _line_sites(text: str) -> Iterator[_Site]:
    lines = text.split("\n")  # splitlines would split at form feeds, too
    for begin in range(1, len(lines)):
        end, after = begin, ""
        while end < len(lines) and lines[end].strip() and len(after.strip()) < _CONTINUATION[0]:
            after += "\n" + lines[end]
            end += 1
        yield from _site(lines, begin, end, "\n", after)


_SENTENCE_BEGINS = re.compile(r"[\"'`(*]*[A-Z]")


def _sentence_sites(text: str) -> Iterator[_Site]:
    words: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        top, more = len(words), paragraph.split()
        if not more or not _SENTENCE_BEGINS.match(more[0]) or more[-1][-1] not in ".!?:":
            continue  # a heading, a table, code
        words += more
        inner = range(top + 1, len(words))
        starts = [top, *(i for i in inner if words[i - 1][-1] in ".!?" and _SENTENCE_BEGINS.match(words[i]))]
        for start, end in pairwise([*starts, len(words)]):
            for begin in range(start + _WORDS, end - _WORDS + 1):
                yield from _site(words, begin, end, " ", " " + " ".join(words[begin:end]), top)


def _variable_sites(text: str) -> Iterator[_Site]:
    """Every place where a function reads one of its variables, with enough code around."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # written for another Python
        return
    lines, seen = text.split("\n"), set()  # as ast counts them
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = list(_names(function))
        # Names with underscores at their ends are left out: tokenizers join "(_" and "_)".
        bound = {name for *_, name, is_read in names if not is_read and name == name.strip("_")} - {"self", "cls"}
        for row, column, name, is_read in names:
            line = lines[row - 1]
            # Columns count bytes, and those inside an f-string are wrong before Python 3.12.
            if not is_read or name not in bound or not line.isascii() or not line[column:].startswith(name):
                continue
            if (row, column) in seen:  # nested functions are walked twice
                continue
            seen.add((row, column))
            end, after = row, line[column:]
            while end < function.end_lineno and len(after.rstrip()) < _CONTINUATION[0]:
                after += "\n" + lines[end]
                end += 1
            for site in _site([*lines[: row - 1], line[:column]], row, end, "\n", after, function.lineno - 1):
                earlier = {other for other_row, _, other, _ in names if site.first < other_row < row} & bound
                if name in earlier and len(earlier) > 1:
                    rest = site.text.removeprefix(name)
                    yield replace(site, rivals=tuple(other + rest for other in sorted(earlier - {name})))


def _names(function: ast.AST) -> Iterator[tuple[int, int, str, bool]]:
    """(line from 1, column in bytes, name, whether it is read) of a function's arguments and variables."""
    quoted = {id(node) for text in ast.walk(function) if isinstance(text, ast.JoinedStr) for node in ast.walk(text)}
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            yield node.lineno, node.col_offset, node.arg, False
        elif isinstance(node, ast.Name) and id(node) not in quoted:
            yield node.lineno, node.col_offset, node.id, isinstance(node.ctx, ast.Load)
