"""Files that a foreign file names: they lie in its own directory, or the name is refused."""

from pathlib import Path

from glm45_tune.errors import CheckpointError


def shown(text: object) -> str:
    """A foreign text as a message shows it: escaped, and cut where it is long."""
    said = ascii(text)
    return said if len(said) <= 120 else f"{said[:100]}… ({len(said)} characters)"


def member(directory: Path, name: object, by: str) -> Path:
    """The regular file `name` of a checkpoint's directory. by: which file names it. Raises CheckpointError.

    A link is followed as far as it stays in the directory, or in the blobs of the hub cache that the directory is part of.
    """
    if not isinstance(name, str) or not name or len(name) > 255 or set(name) & set("/\\\0") or name in (".", ".."):
        raise CheckpointError(
            f"{directory}/{by}: names {shown(name)} as a file; the name of a file in that directory is expected."
        )
    path = directory / name
    if not path.is_file():
        raise CheckpointError(
            f"{directory}/{by}: names {shown(name)}, which is not a file there. Is the download complete?"
        )
    check_link(path)
    return path


def check_link(path: Path) -> None:
    """Raise CheckpointError when `path` is a link that leads out of its directory, other than into its hub cache's blobs."""
    if not path.is_symlink():
        return
    directory, real = path.parent.resolve(), path.resolve()
    homes = [directory]
    if len(directory.parents) > 1 and directory.parent.name == "snapshots":
        homes.append(directory.parents[1] / "blobs")  # models--ORG--NAME/snapshots/REVISION/FILE
    if real.parent not in homes:
        raise CheckpointError(
            f"{path}: is a link to {real}, outside its directory. Put the file itself there, or a hard link."
        )
