"""Mirrors src/elastic_ep/guided."""
