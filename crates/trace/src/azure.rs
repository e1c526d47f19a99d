//! The Azure LLM inference traces of 2023: CSV with a header `TIMESTAMP,ContextTokens,GeneratedTokens`.

use std::io::Read;

use crate::TraceRequest;

/// The header of the format.
pub(crate) const HEADER: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

/// Reads records; an error is the line's number and what is wrong with it.
pub(crate) struct Records<R> {
    lines: csv::StringRecordsIntoIter<R>,
    /// Whether the header has been looked at.
    begun: bool,
    /// Arrival of the first request, in milliseconds since 1970.
    begin_ms: Option<i64>,
}

impl<R: Read> Records<R> {
    pub fn new(reader: R) -> Self {
        let lines = csv::ReaderBuilder::new().trim(csv::Trim::All).flexible(true).from_reader(reader).into_records();
        Self { lines, begun: false, begin_ms: None }
    }

    fn check_header(&mut self) -> Result<(), String> {
        let header = self.lines.reader_mut().headers().map_err(|error| error.to_string())?;
        let found: Vec<&str> = header.iter().collect();
        let matches =
            found.is_empty() || found.iter().zip(HEADER).filter(|(a, b)| a.eq_ignore_ascii_case(b)).count() == HEADER.len();
        if matches { Ok(()) } else { Err(format!("the header is {}: expected {}", found.join(","), HEADER.join(","))) }
    }

    fn parse(&mut self, record: &csv::StringRecord) -> Result<TraceRequest, String> {
        let field = |index: usize| record.get(index).ok_or_else(|| format!("no field {}", HEADER[index]));
        let count = |index: usize| {
            let text = field(index)?;
            text.parse::<u32>().map_err(|error| format!("{} is {text:?}: {error}", HEADER[index]))
        };
        let timestamp = field(0)?;
        let time_ms = parse_time_ms(timestamp)
            .ok_or_else(|| format!("TIMESTAMP is {timestamp:?}: expected a time such as 2023-11-16 18:15:46.680"))?;
        let begin_ms = *self.begin_ms.get_or_insert(time_ms);
        Ok(TraceRequest {
            // Requests are in order of arrival; one that claims to be earlier than the first came with it.
            arrival_ms: u64::try_from(time_ms - begin_ms).unwrap_or(0),
            prompt_tokens: count(1)?,
            output_tokens: count(2)?,
            blocks: Vec::new(),
        })
    }
}

impl<R: Read> Iterator for Records<R> {
    type Item = Result<TraceRequest, (u64, String)>;

    fn next(&mut self) -> Option<Self::Item> {
        if !std::mem::replace(&mut self.begun, true)
            && let Err(reason) = self.check_header()
        {
            return Some(Err((1, reason)));
        }
        let record = match self.lines.next()? {
            Ok(record) => record,
            Err(error) => {
                let line = error.position().map_or(0, csv::Position::line);
                return Some(Err((line, error.to_string())));
            }
        };
        let line = record.position().map_or(0, csv::Position::line);
        Some(self.parse(&record).map_err(|reason| (line, reason)))
    }
}

/// Milliseconds since 1970 of `2023-11-16 18:15:46.6805900`.
fn parse_time_ms(text: &str) -> Option<i64> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let [year, month, day] = split::<3>(date, '-')?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [hour, minute, second] = split::<3>(time, ':')?;
    let valid = (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second <= 60;
    if !valid || fraction.is_empty() || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let milliseconds: i64 = format!("{fraction:0<3}")[..3].parse().ok()?;
    let seconds = ((days_since_1970(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(seconds * 1000 + milliseconds)
}

fn split<const N: usize>(text: &str, separator: char) -> Option<[i64; N]> {
    let numbers: Vec<i64> =
        text.split(separator).map(|part| part.parse::<u16>().map(i64::from)).collect::<Result<_, _>>().ok()?;
    numbers.try_into().ok()
}

/// Days from 1 January 1970 to a date of the Gregorian calendar.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    /// Days before each month of a year that begins with March, so that a leap day comes last.
    const BEFORE_MONTH: [i64; 12] = [306, 337, 0, 31, 61, 92, 122, 153, 184, 214, 245, 275];
    /// Days from 1 March of the year 0 to 1 January 1970.
    const BEFORE_1970: i64 = 719_468;
    let year = if month <= 2 { year - 1 } else { year };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap_days + BEFORE_MONTH[(month - 1) as usize] + day - 1 - BEFORE_1970
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(parse_time_ms("1970-01-01 00:00:00"), Some(0));
        assert_eq!(parse_time_ms("2000-03-01 00:00:00.5"), Some(951_868_800_500));
        assert_eq!(parse_time_ms("2023-11-16 18:15:46.6805900"), Some(1_700_158_546_680));
        for bad in ["", "2023-11-16", "2023-13-16 18:15:46", "2023-11-16 18:15", "2023-11-16 18:15:46.", "2023-11-16 18:15:46.é"]
        {
            assert_eq!(parse_time_ms(bad), None, "{bad}");
        }
    }
}
