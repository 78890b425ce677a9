"""Where traces come from: live models, other people's files, and a process whose optimum is known."""
