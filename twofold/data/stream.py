"""A data set too large to hold: its rows are read and rendered while training, step by step.

The rows of all passes, each pass in an order of its own, make one endless sequence, which depends on the seed alone. Step s
takes the rows from s * batch size on, whichever they are, and a process takes every N-th of them: so a step has the same
rows with any number of processes, and each row is rendered once. A row may give no example (too long, nothing
supervised) or several; the loss is a mean over supervised tokens and does not mind. Resuming reads up to the step's
place again, without rendering.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from twofold.base.batch import Example
from twofold.base.chat import Renderer
from twofold.data.examples import DataConfig, Examples, examples_of, render_row, within
from twofold.data.formats import RowStream, Table, read_stream
from twofold.events import Emit, silent

FIRST_ROWS = 256
"""Rows that the pre-flight looks at."""
BUFFER = 4096
"""Rows among which the next one is drawn."""


@dataclass
class Streamed:
    """The training examples of a stream, as one process sees them.

    Attributes:
        passes: times that the stream was read to its end.
        left_out: examples of this process that were too long, or in which nothing is supervised.
    """

    stream: RowStream
    config: DataConfig
    renderer: Renderer
    batch_size: int
    seed: int
    passes: int = 0
    left_out: int = 0
    _next: int = field(default=-1, repr=False)
    _rows: Iterator[Mapping[str, Any]] = field(default=iter(()), repr=False)

    def examples(self, step: int, rank: int = 0, size: int = 1) -> list[Example]:
        """This process's examples of a step, counted from 0; steps are asked for in order, from any step on.

        Raises:
            DataError: a row cannot be read or rendered.
        """
        if step != self._next:
            self._rows = itertools.islice(self._sequence(), step * self.batch_size, None)
        self._next = step + 1
        rows = list(itertools.islice(self._rows, self.batch_size))
        rendered = [e for row in rows[rank::size] for e in self._rendered(row, step)]
        useful = [e for e in within(rendered, self.config, self.stream.source) if e.supervised_tokens]
        self.left_out += len(rendered) - len(useful)
        return useful

    def _rendered(self, row: Mapping[str, Any], step: int) -> list[Example]:
        return render_row(
            row, self.stream, f"{self.stream.source}, a row of step {step + 1}", self.config, self.renderer
        )

    def _sequence(self) -> Iterator[Mapping[str, Any]]:
        self.passes = 0
        while True:
            yield from self.stream.shuffled(self.seed, BUFFER, self.passes)
            self.passes += 1


def open_stream(config: DataConfig, renderer: Renderer, batch_size: int, seed: int) -> Streamed:
    """The training data of a configuration, as a stream.

    Raises:
        DataError: unreadable, or of no known format.
    """
    return Streamed(read_stream(config.train), config, renderer, batch_size, seed)


def first_examples(streamed: Streamed, emit: Emit = silent) -> Examples:
    """What a stream begins with, and the account of it.

    Raises:
        DataError: a row cannot be rendered, or nothing in these rows is supervised.
    """
    stream = streamed.stream
    table = Table(stream.source, stream.format, stream.columns, stream.first(FIRST_ROWS))
    found = examples_of(table, streamed.config, streamed.renderer, emit)
    return Examples(found.items, replace(found.report, streamed=True))
