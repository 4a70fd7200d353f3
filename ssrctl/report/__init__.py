"""Reports: a document model, and its terminal, html, csv and json forms."""
