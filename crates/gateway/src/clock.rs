//! The date as templates ask for it: `strftime` in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Seconds since 1970; 0 for a clock before that.
pub(crate) fn unix_seconds(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Year, month (1 to 12), day (1 to 31) and day of the year (1 to 366) of a day since 1970.
fn civil(days: u64) -> (u64, usize, u64, u64) {
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    // Whole cycles of 400 years first, so that the loops below are short for any clock.
    let (mut year, mut left) = (1970 + days / 146_097 * 400, days % 146_097);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let ordinal = left + 1;
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1, ordinal)
}

/// Python's `strftime` for the letters that templates use; another letter stays as it is.
pub(crate) fn strftime(now: SystemTime, format: &str) -> String {
    let seconds = unix_seconds(now);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day, ordinal) = civil(days);
    let weekday = DAYS[usize::try_from(days % 7).unwrap_or(0)];
    let month_name = MONTHS[month - 1];
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(c) = letters.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let Some(letter) = letters.next() else {
            out.push('%');
            break;
        };
        let text = match letter {
            'Y' => year.to_string(),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'j' => format!("{ordinal:03}"),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'M' => format!("{minute:02}"),
            'S' => format!("{:02}", second % 60),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'B' => month_name.to_owned(),
            'b' => month_name[..3].to_owned(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            'Z' => "UTC".to_owned(),
            'z' => "+0000".to_owned(),
            '%' => "%".to_owned(),
            other => format!("%{other}"),
        };
        out.push_str(&text);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let format = "%A %a %d %B %b %Y %y %m %j %H:%M:%S %I%p %% %Q";
        let shown = strftime(at(1_709_210_096), format);
        assert_eq!(shown, "Thursday Thu 29 February Feb 2024 24 02 060 12:34:56 12PM % %Q");
        assert_eq!(strftime(at(0), "%F %T"), "1970-01-01 00:00:00");
        assert_eq!(strftime(at(4_102_444_799), "%F %T %j"), "2099-12-31 23:59:59 365");
    }
}
