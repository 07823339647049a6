"""Staging directories as killed runs leave them."""

from model_export.destination.staging import MAGIC
from tests.fuzz.kills import write


def killed(parent, owner="1 somewhere"):
    """One of which nobody is alive, with half a bundle in it."""
    left = parent / f".fastvlm-{len(owner):016x}"
    write(left / "bundle", "half")
    (left / "lock").touch()
    sign(left, owner)
    return left


def sign(left, owner):
    """Write the lock of a staging directory as if it were made where it is."""
    lock = left / "lock"
    numbers = f"{left.stat().st_ino} {lock.stat().st_ino}"
    lock.write_text(f"{MAGIC}\n{owner}\n{numbers}\n")
