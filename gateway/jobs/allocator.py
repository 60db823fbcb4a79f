"""How glibc hands out memory to a process that trains or scores; read once, when the process starts."""

from __future__ import annotations

# glibc gives memory back after every step and fetches it again: page faults are a tenth to a quarter of the time on CPU.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "67108864",
}
