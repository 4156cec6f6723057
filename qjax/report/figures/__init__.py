"""Figures of tables: a table's columns say which it makes; each is SVG, drawn for a wide screen and for a phone."""
