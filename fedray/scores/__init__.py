"""How samples are judged."""
