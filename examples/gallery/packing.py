"""Which documents share a row, and what the rows then are."""

import numpy as np


PADDING = -1  # the document of tokens that belong to none


def pack(documents: list[np.ndarray], seq: int) -> list[list[int]]:
    """The documents of each row: each is put in the first row that has room."""
    rows: list[list[int]] = []
    for number, document in enumerate(documents):
        for row in rows:
            if sum(len(documents[i]) for i in row) + len(document) <= seq:
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


def lay_out(
    documents: list[np.ndarray], rows: list[list[int]], seq: int
) -> list[np.ndarray]:
    """The tokens of the rows, the document of each, and its position in that."""
    tokens, segments, positions = np.zeros((3, len(rows), seq), np.int32)
    segments[:] = PADDING
    for r, row in enumerate(rows):
        start = 0
        for number in row:
            here = slice(start, start + len(documents[number]))
            tokens[r, here], segments[r, here] = documents[number], number
            positions[r, here] = np.arange(len(documents[number]))
            start = here.stop
    return [tokens, segments, positions]
