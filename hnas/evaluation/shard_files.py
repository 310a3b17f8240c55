"""What a shard of a list leaves to be joined with the others. Without Paddle.

A file holds whole hits rather than accuracies, and whatever they depend on, so that joining can
refuse what does not belong together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError
from hnas.base.files import check_regular, read_json, write_json
from hnas.evaluation.counts import Counts
from hnas.evaluation.shards import Shard
from hnas.evaluation.state import FIELDS, architectures_hash, start_of
from hnas.ranking.agreement import fold_sizes, fold_text, read_folds
from hnas.search_space import Architecture, ArchitectureError

MOST_BYTES = 2**29
KEYS = frozenset({"shard", "list_length", "images", "identity", "architectures"})
ENTRY_KEYS = frozenset({"position", "arch", "folds", *FIELDS})


class ShardError(UserError):
    """Files of shards that cannot be joined; the message names one."""


@dataclass(frozen=True)
class ScoredShard:
    """A shard's architectures and their hits.

    Attributes:
        shard: which one.
        list_length: architectures of the whole list.
        identity: of the whole list's evaluation, e.g. hashes of checkpoint and images.
        archs: of this shard, by name.
        positions: where each stands in the whole list.
        counts: over the same images as in the other shards.
    """

    shard: Shard
    list_length: int
    identity: Mapping[str, str]
    archs: Mapping[str, Architecture]
    positions: Sequence[int]
    counts: Counts


def shard_path(folder: Path, shard: Shard) -> Path:
    """Where a shard's file stands: shards can be gathered in one folder."""
    return folder / f"shard_{shard.number}_of_{shard.of}.json"


def write_shard(folder: Path, scored: ScoredShard) -> Path:
    """Write a shard's file, in one step, and give its path.

    Raises:
        UserError: it cannot be written.
    """
    counts = scored.counts
    columns = zip(*(column.tolist() for column in counts.columns()), strict=True)
    rows = zip(scored.archs.items(), scored.positions, columns, counts.folds.tolist(), strict=True)
    path = shard_path(folder, scored.shard)
    content = {
        "shard": str(scored.shard),
        "list_length": scored.list_length,
        "images": counts.images,
        "identity": dict(scored.identity),
        "architectures": {
            name: {
                "position": position,
                "arch": arch.code,
                **dict(zip(FIELDS, hits, strict=True)),
                "folds": fold_text(folds),
            }
            for (name, arch), position, hits, folds in rows
        },
    }
    write_json(path, content)
    return path


def read_shard(path: str | Path) -> ScoredShard:
    """What :func:`write_shard` wrote.

    Raises:
        ShardError: it is something else, or holds hits that no images can have given.
    """
    try:
        check_regular(path)
        if Path(path).stat().st_size > MOST_BYTES:
            raise ShardError(f"{path} is larger than {MOST_BYTES // 2**20} MiB")
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return _scored(read_json(path))
    except (ValueError, ArchitectureError) as error:
        raise ShardError(f"{path} is no file of a shard ({error}); score it again") from None


def _scored(content: Mapping) -> ScoredShard:
    if set(content) != KEYS:
        raise ValueError(f"its keys are not {', '.join(sorted(KEYS))}")
    length, images = content["list_length"], content["images"]
    if not all(type(number) is int and 0 < number < 2**53 for number in (length, images)):
        raise ValueError("list_length or images is no number of them")
    identity, entries = content["identity"], content["architectures"]
    if not isinstance(content["shard"], str) or not _is_text(identity):
        raise ValueError("shard is no text, or identity no object of texts")
    if not isinstance(entries, dict) or not 0 < len(entries) <= length:
        raise ValueError("architectures is no part of a list")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != ENTRY_KEYS:
            raise ValueError(f"architecture {name!r} has not the keys {sorted(ENTRY_KEYS)}")
    archs = {name: Architecture.from_code(entry["arch"]) for name, entry in entries.items()}
    positions = [entry["position"] for entry in entries.values()]
    if not all(type(position) is int and 0 <= position < length for position in positions):
        raise ValueError("a position that is not in the list")
    counts = _counts(entries.values(), images)
    return ScoredShard(Shard.read(content["shard"]), length, identity, archs, positions, counts)


def _is_text(identity: object) -> bool:
    return isinstance(identity, dict) and all(isinstance(v, str) for v in identity.values())


def _counts(entries: Iterable[Mapping], images: int) -> Counts:
    hits = [[entry[field] for field in FIELDS] for entry in entries]
    if not all(type(number) is int and 0 <= number <= images for row in hits for number in row):
        raise ValueError(f"hits that are not 0 to {images}")
    columns = np.array(hits, dtype=np.int64).T.copy()
    folds = np.array([read_folds(entry["folds"]) for entry in entries], dtype=np.int64)
    if (folds > fold_sizes(images)).any() or (folds.sum(axis=1) != columns[0]).any():
        raise ValueError("folds that do not add up to the top-1 hits")
    if (columns[0] > columns[1]).any():
        raise ValueError("more top-1 than top-5 hits")
    return Counts(*columns, images, folds)


def join(paths: Sequence[str | Path]) -> tuple[dict[str, Architecture], Counts]:
    """The whole list, in its order, from the files of all its shards, in any order.

    Raises:
        ShardError: one is no file of a shard, two do not belong together, or one is missing or
            there twice.
    """
    if not paths:
        raise ShardError("no files of shards are given")
    parts = [read_shard(path) for path in paths]
    first = parts[0]
    seen: dict[Shard, str | Path] = {}
    for path, part in zip(paths, parts, strict=True):
        _check_belongs(path, part, paths[0], first)
        if part.shard in seen:
            raise ShardError(f"{path} is shard {part.shard}, as {seen[part.shard]} is; give one")
        seen[part.shard] = path
    missing = [n for n in range(1, first.shard.of + 1) if Shard(n, first.shard.of) not in seen]
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise ShardError(f"of {first.shard.of} shards these are missing: {listed}")
    return _whole(paths, parts)


def _check_belongs(path, part: ScoredShard, other, first: ScoredShard) -> None:
    for what, own, others in (
        ("number of shards", part.shard.of, first.shard.of),
        ("number of architectures", part.list_length, first.list_length),
        ("number of images", part.counts.images, first.counts.images),
        *(
            (name.replace("_", " "), part.identity.get(name), first.identity.get(name))
            for name in sorted({*part.identity, *first.identity})
        ),
    ):
        if own != others:
            own, others = (start_of(str(value)) for value in (own, others))
            raise ShardError(
                f"{path} is of another {what} than {other} ({own} instead of {others}); give "
                "shards of one evaluation"
            )


def _whole(
    paths: Sequence[str | Path], parts: Sequence[ScoredShard]
) -> tuple[dict[str, Architecture], Counts]:
    length, images = parts[0].list_length, parts[0].counts.images
    owner = np.full(length, -1)
    entries: list[tuple[str, Architecture] | None] = [None] * length
    counts = Counts.zeros(length)
    counts.images = images
    for number, part in enumerate(parts):
        for position, entry in zip(part.positions, part.archs.items(), strict=True):
            if entries[position] is not None:
                raise ShardError(
                    f"{paths[number]} and {paths[owner[position]]} both hold the list's "
                    f"architecture {position + 1}; were they cut from one list?"
                )
            entries[position], owner[position] = entry, number
        for column, own in zip(counts.columns(), part.counts.columns(), strict=True):
            column[part.positions] = own
        counts.folds[part.positions] = part.counts.folds
    if None in entries:
        raise ShardError(
            f"the shards lack the list's architecture {entries.index(None) + 1}; was it removed "
            "from its file?"
        )
    archs = dict(entries)
    if len(archs) < length or architectures_hash(archs) != parts[0].identity["architecture_list"]:
        raise ShardError(
            f"the architectures of {paths[0]} and the others are not those of the list that was "
            "cut; has one of the files been changed?"
        )
    return archs, counts
