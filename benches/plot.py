"""Draws the cases of benches/side_by_side.json as bars: tokens/s and VmHWM, the peer beside ours.

    plot.py [side_by_side.json [side_by_side.svg]]

A bar's length is the ratio to the peer, so that cases of any size stand beside each other; its label has the number itself.
Greys that read on light and dark ground, no background of its own.
"""
import json
import sys
from html import escape
from pathlib import Path

TEXT, PEER, OURS = '#768390', '#8b949e', ['#d97f30', '#4a90c4', '#3fa36b']
BAR, GAP, HEAD, FOOT = 13, 3, 50, 26
NAMES, PANEL, LABEL, MARGIN = 130, 190, 105, 16
PANELS = [('tokens/s (longer is better)', 'tokens_per_second', lambda value: f'{value:.0f}'),
          ('VmHWM of a rank (shorter is better)', 'peak_rss_bytes', lambda value: f'{value / 1e9:.2f} GB')]


def bars(case: dict) -> list[dict]:
    """The peer and our methods on 2 ranks."""
    return [row for row in case['rows']
            if row['cores'] == 2 and (row['system'] == 'peer' or row['how']['layout'] == {'ranks': 2, 'threads': 1}
                                      and row['how'].get('experts_over', 1) == 1)]


def colours(cases: dict) -> dict[str, str]:
    """By method of ours, in the order of their first appearance."""
    methods = dict.fromkeys(row['how']['method'] for case in cases.values() for row in bars(case) if row['system'] != 'peer')
    return dict(zip(methods, OURS))


def text(x: float, y: float, words: str, size: int = 11, anchor: str = 'start', weight: str = 'normal') -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
            f'fill="{TEXT}">{escape(words)}</text>')


def rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5" fill="{colour}"/>'


def legend(palette: dict[str, str], y: float) -> list[str]:
    parts, x = [], float(MARGIN)
    for name, colour in {'FSDP2 + PEFT, its fastest way': PEER, **{f'xorl-dist, {m}': c for m, c in palette.items()}}.items():
        parts += [rectangle(x, y - 9, 10, 10, colour), text(x + 14, y, name, 10)]
        x += 30 + 5.4 * len(name)
    return parts


def panel(x: float, title: str, key: str, shown, cases: dict, palette: dict[str, str]) -> list[str]:
    longest = max(row[f'{key}_ratio'] for case in cases.values() for row in bars(case))
    unit = PANEL / max(longest, 1.0)
    parts, y = [text(x, HEAD - 10, title, weight='bold')], float(HEAD)
    for case in cases.values():
        for row in bars(case):
            ratio = row[f'{key}_ratio']
            colour = PEER if row['system'] == 'peer' else palette[row['how']['method']]
            label = shown(row[key]) + ('' if row['system'] == 'peer' else f' · {ratio:.2f}×')
            parts += [rectangle(x, y, ratio * unit, BAR, colour), text(x + ratio * unit + 4, y + BAR - 3, label, 10)]
            y += BAR + GAP
        y += 3 * GAP
    # Where the peer ends.
    parts.append(f'<line x1="{x + unit:.1f}" y1="{HEAD - 4}" x2="{x + unit:.1f}" y2="{y - 3 * GAP:.1f}" stroke="{TEXT}" '
                 f'stroke-width="1" stroke-dasharray="2 3"/>')
    return parts


def case_names(cases: dict) -> tuple[list[str], float]:
    """The names at the left, and where their last case ends."""
    parts, y = [], float(HEAD)
    for name, case in cases.items():
        height = len(bars(case)) * (BAR + GAP)
        parts.append(text(NAMES - 10, y + height / 2 + 2, name, anchor='end'))
        y += height + 3 * GAP
    return parts, y


def draw(cases: dict, path: Path) -> None:
    cases = {name: case for name, case in cases.items() if all(row['tokens_per_second_ratio'] for row in bars(case)) and bars(case)}
    if not cases:
        return
    palette = colours(cases)
    parts, bottom = case_names(cases)
    width = NAMES + len(PANELS) * (PANEL + LABEL) + MARGIN
    for i, (title, key, shown) in enumerate(PANELS):
        parts += panel(NAMES + i * (PANEL + LABEL), title, key, shown, cases, palette)
    parts += legend(palette, 16)
    newest = max(cases.values(), key=lambda case: case['date'])
    note = f'2 cores of {newest["machine"]["cpu"]}, bf16, torch {newest["versions"]["torch"]}, {newest["date"][:10]}, {newest["commit"]}'
    parts.append(text(MARGIN, bottom + FOOT - 12, note, 9))
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + FOOT:.0f}" '
                    f'viewBox="0 0 {width} {bottom + FOOT:.0f}" font-family="system-ui, sans-serif">\n' + '\n'.join(parts) + '\n</svg>\n')


if __name__ == '__main__':
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name('side_by_side.json'))
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix('.svg')
    draw(json.loads(source.read_text())['cases'], target)
