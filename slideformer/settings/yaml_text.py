"""YAML files of settings: one mapping, or a message with the line that is not."""

from __future__ import annotations

from typing import Any

import yaml

from slideformer.graph.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Plain data only; a name that is set twice is a mistake, not the last one's turn."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, as the base class makes it."""
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value!r} is set a second time", problem_mark=key.start_mark
                    )
                names.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | bytes, path: str) -> dict[str, Any]:
    """The settings in a text that errors call ``path``; raises `ConfigError`."""
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or error.context
        raise ConfigError(
            f"{path}, line {line}: not valid YAML: {problem}; write one 'name: value' per line"
        ) from None
    except yaml.YAMLError:
        raise ConfigError(f"{path}: not a text file in UTF-8; give a YAML file") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    except ValueError as error:  # PyYAML's own dates, such as 2026-13-01
        raise ConfigError(f"{path}: not valid YAML: {error}; put the value in quotes") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds a {type(content).__name__}; write one 'name: value' per line"
        )
    return {str(name): value for name, value in content.items()}
