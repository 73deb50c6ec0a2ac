"""Jobs as their callers know them: identity, phase, event log, watchers. Nothing here computes or knows the wire."""
