"""The Celery app and its tasks: `paint` needs a GPU, `frame` only a part of a CPU."""

import os
from pathlib import Path

from celery_capacity import create_app

app = create_app("gallery")

#: Pictures go to a folder that workers and the web process share; only paths travel in messages.
PICTURES = Path(os.environ.get("PICTURES", "pictures")).absolute()


@app.task(cpus=2, memory="64MiB", gpus=1)
def paint(name: str, size: int = 64) -> str:
    """Paint a picture, and return its path. A loop stands for the model that would run on the GPU."""
    rows = []
    for y in range(size):
        for x in range(size):
            point, value, steps = complex(3 * x / size - 2.2, 3 * y / size - 1.5), 0j, 0
            while abs(value) < 2 and steps < 50:
                value, steps = value * value + point, steps + 1
            rows.append(steps * 5)
    return save(f"{name}.pgm", size, rows)


@app.task(cpus=0.5, memory="16MiB")
def frame(path: str) -> str:
    """Draw a white frame around a picture, and return the path of the new one."""
    size, pixels = load(path)
    edge = (0, size - 1)
    framed = [255 if x in edge or y in edge else pixels[y * size + x] for y in range(size) for x in range(size)]
    return save(f"{Path(path).stem}-framed.pgm", size, framed)


def save(name: str, size: int, pixels: list[int]) -> str:
    """Write a grey picture. A second attempt of the same job writes the same file again."""
    PICTURES.mkdir(exist_ok=True)
    path = PICTURES / name
    path.write_bytes(f"P5 {size} {size} 255\n".encode() + bytes(pixels))
    return str(path)


def load(path: str) -> tuple[int, bytes]:
    """Return the side and the pixels of a picture."""
    head, _, pixels = Path(path).read_bytes().partition(b"\n")
    return int(head.split()[1]), pixels
