"""Tasks that come with the project: small models on data that needs no download."""
