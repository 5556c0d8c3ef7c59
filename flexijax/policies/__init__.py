"""Cache methods: which heads are kept how, what is observed, how tokens and pages are ranked."""
