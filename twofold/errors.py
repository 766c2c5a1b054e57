"""Every error that Twofold raises on purpose.

TwofoldError
├── UserError                 the user's to mend: exit code 2
│   ├── ConfigError           a configuration that cannot be read or makes no sense
│   │   └── ClashError        an adapter that cannot be on a model beside another that is
│   ├── TargetError           module patterns that match nothing, or the wrong thing
│   ├── AdapterFileError      an adapter folder that is damaged, foreign or not understood
│   ├── BaseError             a base model that cannot be found or read
│   │   └── ForeignBaseError  an adapter over a base that it was not trained on
│   ├── DataError             examples that cannot be read, or that teach nothing
│   ├── RunError              a run folder that cannot be used as asked
│   └── DownloadError         a package that cannot be fetched
├── TrainingError             training that cannot go on
│   ├── NonFiniteLossError    a loss or gradient that is NaN or infinite
│   ├── LostProcessError      another process of the training is gone
│   └── StoppedError          training that was asked to stop, and can be resumed
├── AnswerError               an answer that a model cannot go on with
└── ProofError                a proof that failed: what was made is not what was promised
"""

from __future__ import annotations

import difflib
import heapq
import itertools
from collections.abc import Iterable

COMPARED = 100
"""Words that are compared in full with one that is not known."""


class TwofoldError(Exception):
    """Root of the tree. The message is one clear sentence that names the thing, the place and the way out."""


class UserError(TwofoldError):
    """Something the user can mend."""


class ConfigError(UserError):
    """A configuration that cannot be read or makes no sense."""


class ClashError(ConfigError):
    """An adapter that cannot be on a model beside another that is."""


class TargetError(UserError):
    """Module patterns that match nothing, or the wrong thing."""


class AdapterFileError(UserError):
    """An adapter folder that is damaged, foreign or not understood."""


class BaseError(UserError):
    """A base model that cannot be found or read."""


class ForeignBaseError(BaseError):
    """An adapter over a base that it was not trained on."""


class DataError(UserError):
    """Examples that cannot be read, or that teach nothing."""


class RunError(UserError):
    """A run folder that cannot be used as asked."""


class DownloadError(UserError):
    """A package that cannot be fetched."""


class TrainingError(TwofoldError):
    """Training that cannot go on."""


class NonFiniteLossError(TrainingError):
    """A loss or gradient that is NaN or infinite."""


class LostProcessError(TrainingError):
    """Another process of the training is gone."""


class StoppedError(TrainingError):
    """Training that was asked to stop, and can be resumed."""


class AnswerError(TwofoldError):
    """An answer that a model cannot go on with."""


class ProofError(TwofoldError):
    """A proof that failed: what was made is not what was promised."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known words most like `word`, best first; empty when nothing is close.

    Only those that share most pairs of letters with it are compared in full: among thousands, that takes a third of a second.
    """
    pairs = set(itertools.pairwise(word))
    likely = heapq.nlargest(COMPARED, known, key=lambda w: len(pairs.intersection(itertools.pairwise(w))))
    return difflib.get_close_matches(word, likely, n=n, cutoff=0.6)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause like ``; did you mean "q_proj"?``, or nothing when no known word is close."""
    found = nearest(word, known)
    return f"; did you mean {' or '.join(repr(w) for w in found)}?" if found else ""
