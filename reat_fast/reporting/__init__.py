"""What report.html shows: figures read from run folders, tables, drawings and pages."""
