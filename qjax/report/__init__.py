"""Results that are kept and shown: one schema for all of them, their tables, figures and pages."""
