"""Geometry of the harmfulness-utility plane: points, error bars and labels that stay clear of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resafe.eval.view import Line

WIDTH, HEIGHT = 440, 340
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 46
FONT = 11.0
SHAPES = ("circle", "square", "triangle", "diamond", "down", "cross")
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass
class Point:
    """A mark in drawing coordinates: its error bars, its style and where its label went."""

    label: str
    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    style: str  # class of its colour
    path: str  # outline of the mark
    title: str
    text_x: float = 0.0
    text_y: float = 0.0
    far: bool = False  # the label needs a line to its mark


def to_x(rate: float) -> float:
    return round(LEFT + 8 + rate * (WIDTH - LEFT - RIGHT - 16), 1)


def to_y(rate: float) -> float:
    return round(HEIGHT - BOTTOM - 8 - rate * (HEIGHT - TOP - BOTTOM - 16), 1)


def points(lines: Sequence[Line], mitigations: Sequence[str], harm: int, utility: int) -> list[Point]:
    """A mark per line, labels placed; `harm` and `utility` are positions of columns.

    `mitigations` are those of the whole report, so that each keeps its colour and shape from panel to panel.
    """
    names = list(dict.fromkeys(m for m in mitigations if m != "none"))
    found = [p for line in lines if (p := _point(line, names, harm, utility))]
    _place_labels(found)
    return found


def _point(line: Line, names: list[str], harm: int, utility: int) -> Point | None:
    h, u = line.cells[harm], line.cells[utility]
    if h is None or u is None or h.row["value"] is None or u.row["value"] is None:
        return None
    i = names.index(line.mitigation) if line.mitigation in names else -1
    style = f"c{i % 8}" if i >= 0 else "reference" if line.attack == "none" else "attacked"
    x, y = to_x(h.row["value"]), to_y(u.row["value"])
    title = f"{line.label}: harmfulness {h.value} {h.interval}, utility {u.value} {u.interval}"
    return Point(
        line.label, x, y, to_x(h.row["low"]), to_x(h.row["high"]), to_y(u.row["low"]), to_y(u.row["high"]),
        style, outline(SHAPES[i % len(SHAPES)] if i >= 0 else "circle", x, y), title,
    )  # fmt: skip


def outline(shape: str, x: float, y: float, r: float = 5.0) -> str:
    """SVG path of a mark; shapes differ so that colour is never the only cue."""
    if shape == "circle":
        return f"M{x - r} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    t = r / 2.6
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
        "down": [(0, 1.2), (1.15, -0.9), (-1.15, -0.9)],
        "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        "cross": [
            (-t, -r),
            (t, -r),
            (t, -t),
            (r, -t),
            (r, t),
            (t, t),
            (t, r),
            (-t, r),
            (-t, t),
            (-r, t),
            (-r, -t),
            (-t, -t),
        ],
    }
    scale = 1.0 if shape == "cross" else r * 0.95
    return "M" + "L".join(f"{round(x + dx * scale, 1)} {round(y + dy * scale, 1)}" for dx, dy in corners[shape]) + "z"


def _place_labels(points: Sequence[Point]) -> None:
    """Greedy: each label takes the free place nearest to its mark, on rings around it."""
    taken: list[Box] = [_around(p.x, p.y, 7) for p in points]
    taken += [b for p in points for b in ((p.x_low, p.y - 1, p.x_high, p.y + 1), (p.x - 1, p.y_high, p.x + 1, p.y_low))]
    for point in sorted(points, key=lambda p: (p.y, p.x)):
        width = 0.56 * FONT * len(point.label)
        others = [(p.x, p.y) for p in points if p is not point]
        spots = [(r, a) for r in (12, 22, 34, 48, 64, 82, 102, 124) for a in range(0, 360, 20)]
        boxes = [(radius, _label_box(point, width, radius, angle)) for radius, angle in spots]
        radius, box = min(boxes, key=lambda b: b[0] + _cost(b[1], taken) + _confusion(b[1], point, others))
        point.text_x, point.text_y, point.far = round(box[0], 1), round(box[3] - 3, 1), radius > 12
        taken.append(box)


def _label_box(point: Point, width: float, radius: float, angle: float) -> Box:
    dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    centre_x = point.x + dx * (radius + width / 2 * abs(dx))
    top = point.y + dy * radius - FONT / 2 - 1
    return centre_x - width / 2, top, centre_x + width / 2, top + FONT + 3


def _around(x: float, y: float, r: float) -> Box:
    return x - r, y - r, x + r, y + r


def _cost(box: Box, taken: Sequence[Box]) -> float:
    """What a place costs for leaving the frame and for lying on something."""
    left, top, right, bottom = box
    outside = (
        max(0.0, LEFT - left) + max(0.0, right - WIDTH + 2) + max(0.0, TOP - top) + max(0.0, bottom - HEIGHT + BOTTOM)
    )
    return 40 * outside + sum(_overlap(box, other) for other in taken)


def _confusion(box: Box, own: Point, others: Sequence[tuple[float, float]]) -> float:
    """What it costs to be nearer to another mark than to one's own."""
    nearest = min((_distance(box, x, y) for x, y in others), default=math.inf)
    return 4 * max(0.0, _distance(box, own.x, own.y) - nearest)


def _distance(box: Box, x: float, y: float) -> float:
    return math.hypot(max(box[0] - x, 0.0, x - box[2]), max(box[1] - y, 0.0, y - box[3]))


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def label_line(point: Point) -> dict[str, Any]:
    """From the mark to the nearest end of a label that stands apart."""
    width = 0.56 * FONT * len(point.label)
    x = min(max(point.x, point.text_x), point.text_x + width)
    y = point.text_y + 2 if point.text_y < point.y else point.text_y - FONT + 1
    return {"x": round(x, 1), "y": round(y, 1)}
