"""Looks in sm_90's machine code for a product whose left operand is overwritten while it is read.

A wgmma is asynchronous: registers that hold its left operand are busy until the warpgroup waits.
ptxas before 13.3 may write to them earlier (triton#9433).
"""

import re
from itertools import pairwise

from compile_only import instructions

# Their first operand is read.
_READING = ("WARPSYNC", "BRX", "JMX", "RET", "NANOSLEEP", "CALL", "BAR", "R2P")
_FOUR = re.compile(r"\.128|^LDSM\S*\.4|^HMMA")
_TWO = re.compile(r"\.64|\.WIDE|\.F64|^LDSM\S*\.2|^D[A-Z]|^CS2R(?!\.32)")

# Of a loop that never waits, the oldest count as one.
_MOST_GROUPS = 4


def left_operand(instruction: str) -> set[int]:
    """Registers that a wgmma takes its left operand from; none where it takes it from memory."""
    found = re.search(r"HGMMA\S* R\d+, R(\d+), gdesc", instruction)
    return set(range(int(found[1]), int(found[1]) + 4)) if found else set()


def written(instruction: str) -> set[int]:
    """Registers of a thread that an instruction writes."""
    name, _, operands = re.sub(r"^@!?U?P\w+ ", "", instruction).partition(" ")
    found = re.match(r"\s*(?:!?P[\dT], )?R(\d+)\b", operands)
    if found is None or name.startswith(_READING):
        return set()
    first, count = int(found[1]), 1
    if product := re.match(r"HGMMA\.64x(\d+)x", name):
        count = int(product[1]) // 2
    elif _FOUR.search(name):
        count = 4
    elif _TWO.search(name):
        count = 2
    return set(range(first, first + count))


def successors(code: dict[int, str]) -> dict[int, list[int]]:
    """address -> addresses of the instructions that may come next."""
    addresses = sorted(code)
    after = dict(pairwise(addresses))
    meeting = [_target(text) for text in code.values() if "BSSY" in text]
    edges = {}
    for address, text in code.items():
        conditional, name = text.startswith("@"), re.sub(r"^@!?U?P\w+ ", "", text).split(" ")[0]
        falls = name.split(".")[0] not in ("BRA", "EXIT", "RET") or conditional or "BRA.DIV" in name
        nexts = [after[address]] if falls and address in after else []
        if name.startswith(("BRA", "CALL")):
            nexts.append(_target(text))
        elif name.startswith("BSYNC"):
            nexts += meeting
        assert not name.startswith("BRX"), "a jump whose targets are not known here"
        edges[address] = [address for address in nexts if address in code]
    return edges


def _target(instruction: str) -> int:
    return int(re.findall(r"0x([0-9a-f]+)", instruction)[-1], 16)


def overwritten(machine_code: str) -> list[tuple[str, str]]:
    """``(product, what writes to its left operand)``, on any way from the one to the other."""
    code = instructions(machine_code)
    if not any(map(left_operand, code.values())):
        return []
    edges = successors(code)
    found, seen = set(), set()
    # Products in flight, by address: groups in their order, the last one still being added to.
    todo = [(min(code), (frozenset(),))]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        address, groups = state
        text = code[address]
        if wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", text):
            groups = groups[-1 - int(wait[1]) :]
        reading = frozenset().union(*groups)
        found |= {
            (product, address) for product in reading if left_operand(code[product]) & written(text)
        }
        if "HGMMA" in text:
            groups = (*groups[:-1], groups[-1] | {address})
            if "gsb0" in text:
                groups = (*groups, frozenset())
        while len(groups) > _MOST_GROUPS:
            groups = (groups[0] | groups[1], *groups[2:])
        todo += [(following, groups) for following in edges[address]]
    return [(code[product], code[address]) for product, address in sorted(found)]
