"""Dead letters: records that could not be decoded, and how they are sent again."""
