"""The bridge: pairs in the formats of other trainers, written and read."""
