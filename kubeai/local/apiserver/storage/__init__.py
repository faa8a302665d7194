"""Objects and their revisions, the rules of writes, lists and watches, garbage collection."""
