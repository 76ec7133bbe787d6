"""JSON and YAML texts of others, parsed at a bounded cost; what is wrong with them is said in a sentence."""

import json
from collections import Counter

import yaml

MOST_JSON_BYTES = 2**26  # an index of 355B has 4 MB, its tokenizer 20
MOST_YAML_BYTES = 2**18
_MOST_JSON_DEPTH = 64
_MOST_YAML_NODES = 20_000  # with every alias written out


class DocumentError(ValueError):
    """A text that is not what it should be; the message has no place in it yet."""


def parse_json(text: str | bytes) -> dict:
    """The JSON object in a text. Raises DocumentError."""
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise DocumentError("not JSON: it is nested too deep") from None
    except DocumentError:
        raise
    except ValueError as error:
        raise DocumentError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DocumentError(f"holds {type(found).__name__}; a JSON object is expected")
    level: list[object] = [found]
    for _ in range(_MOST_JSON_DEPTH):  # what is read shall also be written again, from deep within a program
        inner = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        ]
        level = [value for values in inner for value in values]
    if level:
        raise DocumentError("not JSON: it is nested too deep")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise DocumentError(f"not JSON that can be trusted: the key {ascii(twice)[:100]} stands in it twice")
    return found


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> object:
    """What a YAML text holds; aliases count as what they stand for. Raises DocumentError."""
    if len(text) > MOST_YAML_BYTES:
        raise DocumentError(f"has {len(text)} characters; at most {MOST_YAML_BYTES} are read")
    reader = None
    try:
        reader = loader(text)
        node = reader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > _MOST_YAML_NODES:
            raise DocumentError(f"holds more than {_MOST_YAML_NODES} values, with its aliases written out")
        return reader.construct_document(node)
    except DocumentError:
        raise
    except RecursionError:
        raise DocumentError("not YAML: it is nested too deep") from None
    except yaml.YAMLError as error:
        raise DocumentError(f"not YAML: {error}") from error
    except (ValueError, OverflowError, TypeError, KeyError, IndexError, AttributeError) as error:
        # a value that looks like a number or a date and is none
        raise DocumentError(f"not YAML: a value in it cannot be read: {error}") from error
    finally:
        if reader is not None:
            reader.dispose()


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node holds when every alias is written out; known: by node's id, 0 while one is being counted."""
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > 1000 and node.tag.endswith((":int", ":float", ":timestamp")):
            raise DocumentError(f"holds a number of {len(node.value)} characters")
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise DocumentError("holds an alias of what it stands in")
        return known[id(node)]
    known[id(node)] = 0
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    known[id(node)] = min(1 + sum(_written_out(part, known) for part in parts), 2 * _MOST_YAML_NODES)
    return known[id(node)]
