"""One workflow per subcommand. Stages never import each other."""
