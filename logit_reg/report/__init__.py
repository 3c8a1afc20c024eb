"""What people read: tables, figures, pages and the leaderboard."""
