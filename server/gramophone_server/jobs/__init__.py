"""Jobs as their clients know them: identity, phase, event log, watchers. Nothing here computes or knows the wire."""
