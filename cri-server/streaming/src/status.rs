//! What stands in the error stream at a session's end: how the process ended, or why there was none.
//!
//! From protocol v4 on it is a Kubernetes `Status` as JSON (metav1.Status), always; before, it is text, and only when something went
//! wrong.

use serde_json::json;

use crate::port::StreamError;

/// How the end is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// v1 to v3.
    Text,
    /// v4 and v5.
    Json,
}

/// The bytes for the error stream; `None`: none.
pub(crate) fn encode(style: Style, end: &Result<i32, StreamError>) -> Option<String> {
    let value = match (style, end) {
        (Style::Text, Ok(0)) => return None,
        (Style::Text, Ok(code)) => return Some(exit_message(*code)),
        (Style::Text, Err(error)) => return Some(failure_message(error)),
        (Style::Json, Ok(0)) => json!({ "metadata": {}, "status": "Success" }),
        (Style::Json, Ok(code)) => json!({
            "metadata": {},
            "status": "Failure",
            "message": exit_message(*code),
            "reason": "NonZeroExitCode",
            "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
        }),
        (Style::Json, Err(error)) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("Internal error occurred: {}", failure_message(error)),
            "reason": "InternalError",
            "details": { "causes": [{ "message": failure_message(error) }] },
            "code": 500,
        }),
    };
    Some(value.to_string())
}

fn exit_message(code: i32) -> String {
    format!("command terminated with non-zero exit code: exit status {code}")
}

fn failure_message(error: &StreamError) -> String {
    format!("error executing command in container: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(end: Result<i32, StreamError>) -> serde_json::Value {
        serde_json::from_str(&encode(Style::Json, &end).unwrap()).unwrap()
    }

    #[test]
    fn an_exit_code_stands_where_clients_look_for_it() {
        assert_eq!(parsed(Ok(0))["status"], "Success");
        let failure = parsed(Ok(42));
        assert_eq!(failure["reason"], "NonZeroExitCode");
        assert_eq!(failure["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(failure["details"]["causes"][0]["message"], "42");
    }

    #[test]
    fn a_command_that_could_not_run_is_an_internal_error_with_its_reason() {
        let failure = parsed(Err(StreamError("no such file".into())));
        assert_eq!(failure["reason"], "InternalError");
        assert_eq!(failure["code"], 500);
        assert!(failure["message"].as_str().unwrap().ends_with("no such file"));
    }

    #[test]
    fn old_protocols_are_told_nothing_of_success() {
        assert_eq!(encode(Style::Text, &Ok(0)), None);
        assert!(encode(Style::Text, &Ok(3)).unwrap().ends_with("exit status 3"));
    }
}
