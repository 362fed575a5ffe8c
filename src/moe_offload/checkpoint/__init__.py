"""A model's weights on disk: sources, conversion, the prepared folder."""
