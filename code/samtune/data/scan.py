"""A look at every file before training starts, through the very reader that training uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from samtune.config import PromptOptions, ReadOptions, Size
from samtune.data.class_shares import ClassShares, Unknown, class_names
from samtune.data.codings import UnknownValues, coding_of
from samtune.data.files import Pair
from samtune.data.images import parse_range
from samtune.data.inspection import digest_of, is_plain
from samtune.data.loading import cores_per_process
from samtune.data.objects import settle_objects, things_of
from samtune.data.samples import NOTES, read_sample
from samtune.data.transforms import fit_scale
from samtune.errors import UserError
from samtune.threads import InOrder

_MOSTLY_FOREGROUND = 0.6
_SLIVER = "images are so narrow that they become one pixel wide in the model's frame"
_LISTED_PROBLEMS = 20
_REPORTS_AT_ONCE = 256  # kept before they become one, so that memory does not grow with the data


@dataclass
class ScanReport:
    """What a scan found; reports of parts of the data add up.

    images: how many pairs were read. problems: a line for each that could not be, naming file and
    flag; unknown: what masks hold that their coding does not know. empty: ids of pictures without
    object (with several classes: without one labelled pixel). sizes: how many pictures there are of
    each (H, W). notes: per kind of remark how many pictures it is about, and the id of the first.
    classes: what each class covers. pictures: how many have this content, by its digest, and the id
    of the first; pictures of one colour are not among them.
    """

    images: int = 0
    problems: list[str] = field(default_factory=list)
    unknown: Unknown = field(default_factory=Unknown)
    empty: list[str] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)
    foreground_sum: float = 0.0
    foreground: str = ""  # the side that --foreground says; "" where a coding fixes it
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    classes: ClassShares = field(default_factory=ClassShares)
    pictures: dict[bytes, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def merge(cls, reports: Iterable[ScanReport]) -> ScanReport:
        """One report of many, in their order."""
        total = cls()
        for report in reports:
            total.images += report.images
            total.problems += report.problems
            total.unknown += report.unknown
            total.classes += report.classes
            total.empty += report.empty
            total.sizes += report.sizes
            total.foreground_sum += report.foreground_sum
            total.foreground = report.foreground
            for known, more in ((total.notes, report.notes), (total.pictures, report.pictures)):
                for kind, (count, first) in more.items():
                    seen, earliest = known.get(kind, (0, first))
                    known[kind] = (seen + count, earliest)
        return total

    def __add__(self, other: ScanReport) -> ScanReport:
        return ScanReport.merge((self, other))

    @property
    def foreground_fraction(self) -> float:
        """The object's share of a picture, averaged over the pictures; 0 without any."""
        return self.foreground_sum / self.images if self.images else 0.0

    @property
    def remarks(self) -> list[str]:
        """What a person should know that is no error, a line each."""
        lines = [
            f"{count} of {self.images} {kind} (for example {first})"
            for kind, (count, first) in self.notes.items()
        ]
        if self.empty:
            what = "show background only" if self.classes.number > 1 else "show no object"
            lines.append(
                f"{len(self.empty)} of {self.images} images {what} (for example {self.empty[0]})"
            )
        lines += self.classes.remarks(self.images)
        repeated = [(count, first) for count, first in self.pictures.values() if count > 1]
        if repeated:
            lines.append(
                f"{len(repeated)} picture(s) occur more than once, {repeated[0][1]} for example "
                f"{repeated[0][0]} times"
            )
        if self.foreground and self.foreground_fraction > _MOSTLY_FOREGROUND:
            other = "below" if self.foreground == "above" else "above"
            lines.append(
                f"the object covers {self.foreground_fraction:.0%} of the images on average: did "
                f"you mean --foreground {other}?"
            )
        return lines

    def raise_problems(self) -> None:
        """Raise one UserError with all problems, if there are any."""
        lines = self.problems[:_LISTED_PROBLEMS]
        if more := len(self.problems) - len(lines):
            lines.append(f"and {more} more like these")
        if self.unknown.files:
            lines.insert(0, self.unknown.line(self.images + len(self.problems)))
        if not lines:
            return
        raise UserError("\n".join(lines))

    def without_pictures(self) -> ScanReport:
        """The report without what grows with the number of files."""
        return replace(self, pictures={})

    def without_empty(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs that show an object."""
        empty = set(self.empty)
        return [pair for pair in pairs if pair.id not in empty]


class SeenPictures:
    """The content of splits that were scanned before: a picture in two of them is no test."""

    def __init__(self):
        self.known: dict[bytes, str] = {}

    def add(self, split: str, report: ScanReport) -> list[str]:
        """Note a split's pictures. Returns a line if earlier splits hold some of them, or none."""
        shared = [digest for digest in report.pictures if digest in self.known]
        lines = []
        if shared:
            _, example = report.pictures[shared[0]]
            lines.append(
                f"{len(shared)} picture(s) are also elsewhere, pixel by pixel ({example} is "
                f"{self.known[shared[0]]}): scores on them say what is remembered, not what was "
                "learned; take them out of one side"
            )
        for digest, (_, first) in report.pictures.items():
            self.known.setdefault(digest, f"{split} {first}")
        return lines


def scan_pairs(
    pairs: list[Pair],
    read: ReadOptions,
    progress: Callable[[int], None] | None = None,
    image_size: int | tuple[int, int] = 0,
) -> ScanReport:
    """Read every pair, in threads, and report. progress: called with 1 after each pair.

    image_size: (S_h, S_w) of the model's frame, or the side of a square, to tell pictures that all
    but vanish in it; 0: not asked.
    """
    if read.intensity_range != "auto":
        parse_range(read.intensity_range)
    coding_of(read)  # flags that contradict each other are said once, not per file
    class_names(read)
    reports = [ScanReport()]

    def take(report: ScanReport) -> None:
        reports.append(report)
        if len(reports) == _REPORTS_AT_ONCE:
            reports[:] = [ScanReport.merge(reports)]
        if progress:
            progress(1)

    threads = InOrder(min(8, cores_per_process()), take)
    for pair in pairs:
        threads.put(_scan, pair, read, Size.read(image_size))
    threads.finish()
    return ScanReport.merge(reports)


def _scan(pair: Pair, read: ReadOptions, frame_size: Size) -> ScanReport:
    side = "" if read.num_classes > 1 or coding_of(read) else read.foreground
    try:
        sample, notes = read_sample(pair, read)
    except UnknownValues as error:
        return ScanReport(unknown=Unknown.of(error, str(pair.mask_path)), foreground=side)
    except UserError as error:
        return ScanReport(problems=[str(error)], foreground=side)
    counts = np.bincount(sample.mask.ravel(), minlength=256)
    several = read.num_classes > 1
    fraction = counts[1] / sample.mask.size
    asked = settle_objects(read, PromptOptions())  # as under a prompt: else nothing is left out
    lines = [NOTES[note] for note in notes]
    size = sample.mask.shape
    if frame_size and min(size) * fit_scale(size, frame_size) < 0.5:
        lines.append(_SLIVER)
    return ScanReport(
        images=1,
        empty=[] if things_of(sample, asked) else [pair.id],
        sizes=Counter([size]),
        foreground_sum=0.0 if several else float(fraction),
        foreground=side,
        notes=dict.fromkeys(lines, (1, pair.id)),
        classes=ClassShares.of(counts, read) if several else ClassShares(),
        pictures={} if is_plain(sample.image) else {digest_of(sample.image): (1, pair.id)},
    )
