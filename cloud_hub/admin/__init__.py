"""The hub seen by people and programs: REST, tokens, OpenAPI."""
