"""Is everything in the wheel that must be, and nothing else? ``check_wheel.py WHEEL``."""

import sys
import zipfile

LIMIT = 12e6  # bytes: the weights of pocket-lm are at most 8 MB


def problems(wheel: str) -> list[str]:
    """What is wrong with a wheel, one line each."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(entry.compress_size for entry in archive.infolist())
    strangers = [n for n in names if not n.startswith(("saex/", "saex-"))]
    out = [f"{n} does not belong into the wheel" for n in strangers]
    for needed in ("saex/models/pocket_lm.safetensors", "saex/report/page.css"):
        if needed not in names:
            out.append(f"{needed} is missing")
    if size > LIMIT:
        out.append(f"{size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")
    return out


if __name__ == "__main__":
    found = problems(sys.argv[1])
    print("\n".join(found) or f"{sys.argv[1]}: complete")
    sys.exit(bool(found))
